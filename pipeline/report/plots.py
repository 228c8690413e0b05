"""The report's plots as SVG texts that can stand inside an HTML page.

Text stays text, ids differ from plot to plot and are the same on every run, and each colour is a CSS variable with a
fallback, so that the page's dark theme reaches into the plots. Inits keep one colour and one marker throughout
(Okabe and Ito's palette, which colour-blind readers can tell apart).
"""

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipeline.core.tables import BASE_ID
from pipeline.report.words import duration, is_number, rate, shorten, step

WIDTH = 440
"""Width in CSS pixels: narrow enough to be read when a phone scales it down."""

TOP = 25
"""Adapters in the leaderboard's plot."""

LABEL_LENGTH = 28

TIMES = (("seconds", 1), ("minutes", 60), ("hours", 3600))

INK, RULE, NEUTRAL = "#24292f", "#d5d9de", "#8c959f"
BASE_COLOUR, MASHUP_COLOUR, OTHER_COLOUR = "#0072b2", "#d55e00", "#009e73"
VARIABLES = {
    INK: "--ink",
    RULE: "--rule",
    NEUTRAL: "--neutral",
    BASE_COLOUR: "--base",
    MASHUP_COLOUR: "--mashup",
    OTHER_COLOUR: "--other",
}
COLOURS = {"base": BASE_COLOUR, "mashup": MASHUP_COLOUR}
MARKERS = {"base": "o", "mashup": "s", "paper": "^", "best_donor": "v", "random_donors": "D", "random_delta": "x"}

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # an adapter's id may hold dollar signs
}


@dataclass(frozen=True)
class Curve:
    """One init at one learning rate: the mean over its seeds at each evaluation, with the lowest and the highest."""

    init: str
    lr: float
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def loss_plot(comparison: pa.Table, chosen: Mapping[str, float], parity: Mapping[str, Any] | None) -> str:
    """Validation NLL against step. `chosen`: the learning rate of each init that is drawn solid; others are faint.

    `parity` as in summary.json, or None where there is none to show.
    """
    curves = read_curves(comparison, "eval_nll")
    label = "Validation NLL against training step for " + _names(curves)
    return svg("loss", partial(_draw_loss, curves=curves, chosen=chosen, parity=parity), 400, label)


def accuracy_plot(comparison: pa.Table, chosen: Mapping[str, float]) -> str:
    """Token accuracy and exact match on the validation split against step, one above the other."""
    tokens, rows = (read_curves(comparison, column) for column in ("eval_token_accuracy", "eval_exact_match"))
    label = "Token accuracy and exact match on the validation split against training step for " + _names(tokens)
    return svg("accuracy", partial(_draw_accuracy, tokens=tokens, rows=rows, chosen=chosen), 400, label)


def leaderboard_plot(leaderboard: pa.Table, donors: Collection[str]) -> str:
    """Bars of NLL minus base with one standard error for the first TOP adapters; chosen donors stand out."""
    adapters = (row for row in leaderboard.to_pylist() if row["adapter_id"] != BASE_ID)
    shown = [row for row in adapters if is_number(row["nll_minus_base"])][:TOP]
    label = f"NLL minus the base's of the first {len(shown)} adapters, with standard errors"
    return svg("leaderboard", partial(_draw_leaderboard, rows=shown, donors=donors), 90 + 22 * max(len(shown), 1), label)


def time_plot(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a stage in the order of running, the share spent starting up hatched."""
    label = "Time by stage: " + ", ".join(f"{name} {duration(stage['seconds'])}" for name, stage in stages.items())
    return svg("time", partial(_draw_time, stages=stages), 80 + 34 * max(len(stages), 1), label)


def pays_plot(parity: Mapping[str, Any]) -> str:
    """Time to parity against how long training from the base takes, for base and mashup. `parity` as in summary.json, with a
    break-even."""
    label = f"Break-even at {duration(parity['break_even_seconds'])} of training from the base"
    return svg("pays", partial(_draw_pays, parity=parity), 260, label)


def read_curves(comparison: pa.Table, column: str) -> list[Curve]:
    """The comparison's curves of `column`, in the table's order. A step that a seed did not reach has no mean (NaN)."""
    found: dict[tuple[str, float], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in comparison.to_pylist():
        found[row["init"], row["lr"]][row["step"]].append(_finite(row[column]))
    return [_curve(init, lr, values) for (init, lr), values in found.items()]


def _curve(init: str, lr: float, values: Mapping[int, Sequence[float]]) -> Curve:
    steps = sorted(values)
    n_seeds = max(len(values[step]) for step in steps)
    whole = [values[step] if len(values[step]) == n_seeds else [math.nan] for step in steps]
    return Curve(init, lr, steps, *([float(reduce(v)) for v in whole] for reduce in (np.mean, np.min, np.max)))


def _finite(value: float | None) -> float:
    return value if value is not None and is_number(value) else math.nan


def _names(curves: Sequence[Curve]) -> str:
    return " and ".join(dict.fromkeys(curve.init for curve in curves)) or "no arm"


def svg(name: str, draw: Callable[[Figure], None], height: int, label: str) -> str:
    """The figure that `draw` fills, as an `<svg>` element of its container's width. `name` keeps ids apart from other plots'."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"mashup-{name}"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a browser has more fonts
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _inline(stream.getvalue(), height, label)


def _inline(text: str, height: int, label: str) -> str:
    """An SVG file as an element of a page: no prologue, no fixed size, no ids but those that are referred to."""
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda match: f"{match[1]}: {_variable(match[2])}", text)
    head = f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"<svg [^>]*>", lambda _: f"{head} {names}>", text, count=1)


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour


def _draw_loss(figure: Figure, curves: Sequence[Curve], chosen: Mapping[str, float], parity: Mapping[str, Any] | None) -> None:
    axes = figure.subplots()
    _draw_curves(axes, curves, chosen)
    axes.set(xlabel="step", ylabel="validation NLL, nats a token")
    if parity:
        target = parity["target_nll"]
        axes.axhline(target, color=BASE_COLOUR, linestyle="--", linewidth=1.2, label="the base's final NLL")
        if parity["reached"]:
            marker: dict[str, Any] = {
                "marker": "D",
                "markersize": 9,
                "markerfacecolor": "none",
                "markeredgewidth": 1.6,
                "linestyle": "none",
            }
            axes.plot(parity["steps"], target, color=INK, zorder=5, label=f"parity, step {step(parity['steps'])}", **marker)
    _fit_height(axes, curves, chosen)
    legend_above(figure, axes)


def _draw_accuracy(figure: Figure, tokens: Sequence[Curve], rows: Sequence[Curve], chosen: Mapping[str, float]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_curves(upper, tokens, chosen)
    _draw_curves(lower, rows, chosen)
    upper.set_ylabel("token accuracy")
    lower.set(xlabel="step", ylabel="exact match")
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    legend_above(figure, upper)


def _draw_curves(axes: Axes, curves: Sequence[Curve], chosen: Mapping[str, float]) -> None:
    """Faint curves first, so that the chosen ones lie on top."""
    for curve in sorted(curves, key=lambda one: _is_chosen(one, chosen)):
        colour, solid = COLOURS.get(curve.init, OTHER_COLOUR), _is_chosen(curve, chosen)
        axes.plot(
            curve.steps,
            curve.mean,
            color=colour,
            alpha=1 if solid else 0.45,
            linewidth=2 if solid else 1.2,
            marker=MARKERS.get(curve.init, "^"),
            markersize=5 if solid else 3,
            label=f"{curve.init}, lr {rate(curve.lr)}",
        )
        if solid and curve.low != curve.high:
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)


def _is_chosen(curve: Curve, chosen: Mapping[str, float]) -> bool:
    return curve.init not in chosen or math.isclose(curve.lr, chosen[curve.init])


def _fit_height(axes: Axes, curves: Sequence[Curve], chosen: Mapping[str, float]) -> None:
    """The chosen curves and the lowest of the others fill the frame: one that diverged would press all others flat."""
    high = [value for curve in curves if _is_chosen(curve, chosen) for value in curve.high if math.isfinite(value)]
    low = [value for curve in curves for value in curve.low if math.isfinite(value)]
    if high:
        margin = 0.06 * (max(high) - min(low) or 1.0)
        axes.set_ylim(min(low) - margin, max(high) + margin)


def legend_above(figure: Figure, axes: Axes) -> None:
    """Solid curves first: they are what the plot is about."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        handles.sort(key=lambda handle: handle.get_alpha() not in (None, 1))
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.2)


def _draw_leaderboard(figure: Figure, rows: Sequence[Mapping[str, Any]], donors: Collection[str]) -> None:
    axes = figure.subplots()
    bars = range(len(rows))
    colours = [MASHUP_COLOUR if row["adapter_id"] in donors else NEUTRAL for row in rows]
    axes.barh(bars, [row["nll_minus_base"] for row in rows], color=colours, height=0.68)
    errors = [_finite(row["nll_minus_base_stderr"]) for row in rows]
    middle = [row["nll_minus_base"] for row in rows]
    axes.errorbar(middle, bars, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(0, color=BASE_COLOUR, linewidth=1.4)
    axes.set_yticks(bars, [f"{shorten(row['adapter_id'], LABEL_LENGTH)}  {row['place']}" for row in rows])
    axes.set(xlabel="NLL minus base, nats a token", ylim=(len(rows) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _legend(figure, [(MASHUP_COLOUR, "donor of the mashup"), (NEUTRAL, "not merged")] if donors else [])


def _draw_time(figure: Figure, stages: Mapping[str, Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    bars, spans = range(len(stages)), timeline(stages)
    for bar, (name, mine) in zip(bars, spans.items(), strict=True):
        lefts, widths = [left for left, _ in mine], [width for _, width in mine]
        axes.barh([bar] * len(mine), widths, left=lefts, color=stage_colour(name), height=0.62)
        end = mine[-1][0] + mine[-1][1], bar
        label = duration(float(stages[name]["seconds"]))
        axes.annotate(label, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=11)
    starting = [start_up(stage) for stage in stages.values()]
    begun = [mine[0][0] for mine in spans.values()]
    axes.barh(bars, starting, left=begun, color="none", edgecolor=INK, hatch="////", linewidth=0, height=0.62)
    axes.set_yticks(bars, list(stages))
    last = max(left + width for mine in spans.values() for left, width in mine)
    axes.set(xlabel="seconds, breaks left out", ylim=(len(stages) - 0.4, -0.6), xlim=(0, 1.25 * max(1.0, last)))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    entries = [(MASHUP_COLOUR, "overhead: find, score, merge"), (BASE_COLOUR, "train and test"), (NEUTRAL, "charged to no start")]
    shown = {stage_colour(name) for name in stages}
    _legend(figure, [entry for entry in entries if entry[0] in shown], any(starting))


def stage_colour(name: str) -> str:
    """Apart from training, what is overhead of the mashup, and what is neither: the start of Ray, a plan's calibration."""
    if name == "compare":
        return BASE_COLOUR
    return MASHUP_COLOUR if name in ("index", "samples", "search", "merge") else NEUTRAL


def _draw_pays(figure: Figure, parity: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    even, here = parity["break_even_seconds"], parity["base_seconds"]
    share, overhead = parity["train_seconds"] / here, parity["seconds"] - parity["train_seconds"]
    longest = 1.5 * max(even, here)
    unit, size = next((one for one in TIMES if longest < 200 * one[1]), TIMES[-1])
    ends = np.array([0.0, longest]) / size
    axes.plot(ends, ends, color=BASE_COLOUR, linewidth=2, label="from the base")
    axes.plot(ends, overhead / size + share * ends, color=MASHUP_COLOUR, linewidth=2, label="from the mashup, with overhead")
    marker: dict[str, Any] = {"marker": "D", "markerfacecolor": "none", "markersize": 9, "linestyle": "none"}
    axes.plot(even / size, even / size, color=INK, label="break-even", **marker)
    axes.axvline(here / size, color=NEUTRAL, linestyle="--", linewidth=1.2, label="this run")
    axes.set(xlabel=f"training from the base, {unit}", ylabel=f"time to parity, {unit}", xlim=(0, None), ylim=(0, None))
    legend_above(figure, axes)


def timeline(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """When each stage ran: for each attempt the seconds before it, those in which nothing ran left out, and those that it took.
    Stages of run folders that do not say when are put one behind the other."""
    if not all(stage.get("spans") for stage in stages.values()):
        seconds = [float(stage["seconds"]) for stage in stages.values()]
        return {name: [(sum(seconds[:place]), seconds[place])] for place, name in enumerate(stages)}
    spans = sorted((began, end) for stage in stages.values() for began, end in stage["spans"])
    idle, last, shift = 0.0, spans[0][0], dict[float, float]()
    for began, end in spans:
        idle += max(0.0, began - last)
        last, shift[began] = max(last, end), spans[0][0] + idle
    return {name: [(began - shift[began], end - began) for began, end in stage["spans"]] for name, stage in stages.items()}


def start_up(stage: Mapping[str, Any]) -> float:
    """Seconds that a stage's engines and workers took to start, summed over them: at most the time that the stage took."""
    details = stage["details"]
    seconds = details.get("startup_seconds", details.get("engine_start_seconds", 0.0))
    return min(float(seconds), float(stage["seconds"])) if isinstance(seconds, int | float) else 0.0


def _legend(figure: Figure, entries: Sequence[tuple[str, str]], hatched: bool = False) -> None:
    handles = [Patch(facecolor=colour, label=label) for colour, label in entries]
    if hatched:
        handles.append(Patch(facecolor="none", edgecolor=INK, hatch="////", linewidth=0, label="starting up"))
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.2, columnspacing=1.2)
