"""The history of refreshes -> history.html: how each target's gain moved, its donors, and what the last refreshes did.

One page that needs nothing else, like the report of a run, and as careful with names.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from pipeline.core.storage import Folder
from pipeline.refresh.history import FAILURES, History
from pipeline.report.page import VISIBLE_ROWS, template
from pipeline.report.plots import BASE_COLOUR, MASHUP_COLOUR, NEUTRAL, legend_above, svg

PAGE_FILE = "history.html"
HEIGHT = 260
"""Of a plot, in CSS pixels."""

MARKS = {"published": ("D", MASHUP_COLOUR), "withdrawn": ("X", BASE_COLOUR)}

Row = dict[str, Any]


def write_history(home: Folder) -> str:
    """Write the page beside the table. Returns its URI."""
    home.write_text(PAGE_FILE, render(History.of(home).rows, home.uri))
    return f"{home.uri}/{PAGE_FILE}"


def render(rows: Sequence[Row], home: str) -> str:
    """The page as HTML, of rows of schema HISTORY, the oldest first."""
    shown = [row | {"gain": _gain(row)} for row in rows]
    good: dict[str, list[Row]] = defaultdict(list)
    for row in shown:
        if row["outcome"] not in FAILURES:
            good[row["target"]].append(row)
    plots = {target: Markup(gain_plot(number, good[target])) for number, target in enumerate(sorted(good))}
    latest = {target: good[target][-1] for target in sorted(good)}
    return template("history.html").render(
        home=home, rows=shown[::-1], latest=latest, plots=plots, failures=FAILURES, visible=VISIBLE_ROWS
    )


def gain_plot(number: int, rows: Sequence[Row]) -> str:
    """The gain of a target's selection over time. `number` tells the plots of a page apart."""
    label = "Gain over the base at each refresh: " + ", ".join(f"{row['time']:%Y-%m-%d} {row['gain']:.3f}" for row in rows)
    return svg(f"gain-{number}", partial(_draw, rows=rows), HEIGHT, label)


def _gain(row: Row) -> float:
    """Nats a completion token below the base; none where the base is the better start."""
    return -row["nll_minus_base"] if row["nll_minus_base"] is not None else 0.0


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    axes.axhline(0, color=BASE_COLOUR, linewidth=1.4)
    axes.plot(
        [row["time"] for row in rows], [row["gain"] for row in rows], color=NEUTRAL, linewidth=1.6, marker="o", markersize=4
    )
    for outcome, (marker, colour) in MARKS.items():
        marked = [(row["time"], row["gain"]) for row in rows if row["outcome"] == outcome]
        if marked:
            axes.plot(*zip(*marked, strict=True), color=colour, marker=marker, markersize=7, linestyle="none", label=outcome)
    locator = AutoDateLocator(minticks=2, maxticks=5)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_ylabel("gain, nats a token")
    axes.set_ylim(top=1.12 * max([row["gain"] for row in rows if math.isfinite(row["gain"])] + [0.05]))
    first, last = rows[0]["time"], rows[-1]["time"]
    margin = (last - first) / 16 or timedelta(hours=12)
    axes.set_xlim(first - margin, last + margin)
    legend_above(figure, axes)
