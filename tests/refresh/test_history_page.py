"""The page of a home's refreshes: what it shows, and that names from strangers stay text."""

import html
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE

from pipeline.core.storage import Folder
from pipeline.refresh.history import History
from pipeline.refresh.history_page import render, write_history

BEGAN = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)
SEEN = dict.fromkeys(("adapters", "data", "base", "settings"), "0")


def row(day: int, target: str = "medicine", gain: float | None = 0.4, outcome: str = "kept", **more: Any) -> dict[str, Any]:
    """A row of a refresh that selected three donors, or with gain None the base."""
    return {
        "time": BEGAN + timedelta(days=day),
        "target": target,
        "changed": ["adapters"],
        "seen": SEEN,
        "candidates": 40,
        "adapter_samples": 96,
        "verdict": "base" if gain is None else "mashup",
        "recipe": None if gain is None else "exact-3",
        "donors": [] if gain is None else ["boolq-r8", "hotel-reviews", "sql"],
        "holdout_nll": None if gain is None else 1.6 - gain,
        "base_holdout_nll": 1.6,
        "nll_minus_base": None if gain is None else -gain,
        "outcome": outcome,
        "mashup": None if gain is None else f"s3://team/mashups/published/{target}/2026030{day + 1}-abc",
        "reason": None,
        "seconds": 75.0,
    } | more


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row(0, outcome="published", changed=["new target"]),
        row(0, "law", 0.1, "published", changed=["new target"]),
        row(1, gain=0.402),
        row(1, "law", None, "withdrawn", changed=["data"]),
        row(2, gain=0.55, outcome="published", changed=["adapters", "base"]),
        row(2, "law", outcome="failed", changed=[], reason="OSError: the store is away"),
    ]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<body>") :])))


def test_the_page_shows_donors_gains_and_what_happened(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    home = Folder.at(tmp_path)
    history = History.of(home)
    for one in rows:
        history.add(one)
    assert write_history(home) == str(tmp_path / "history.html")
    page = (tmp_path / "history.html").read_text()
    text = text_of(page)
    now = text[text.index("Donors now") : text.index("Gain over time")]
    assert "medicine 2026-03-03 06:00 exact-3 1.0500 0.5500 boolq-r8, hotel-reviews, sql 20260303-abc" in now
    assert "law 2026-03-02 06:00 base – 0.0000 none beats the base none" in now  # what failed says nothing of donors
    done = text[text.index("Refreshes") :]
    assert "2026-03-03 06:00 law tried again failed – – 1 min 15 s OSError: the store is away" in done
    assert "2026-03-03 06:00 medicine adapters, base published 96 0.5500 1 min 15 s" in done
    assert done.index("2026-03-03") < done.index("2026-03-02") < done.index("2026-03-01")
    labels = re.findall(r'aria-label="(.*?)"', page)
    assert labels == [
        "Gain over the base at each refresh: 2026-03-01 0.100, 2026-03-02 0.000",
        "Gain over the base at each refresh: 2026-03-01 0.400, 2026-03-02 0.402, 2026-03-03 0.550",
    ]


def test_publications_are_marked_in_the_plots(rows: list[dict[str, Any]]) -> None:
    kept = render([row(0), row(1)], "home")
    page = render(rows, "home")
    assert ">published</text>" not in kept
    assert page.count(">published</text>") == 2
    assert page.count(">withdrawn</text>") == 1


def test_names_of_strangers_stay_text(rows: list[dict[str, Any]]) -> None:
    hostile = [one | {"donors": list(HOSTILE), "reason": HOSTILE[0], "mashup": HOSTILE[2]} for one in rows]
    page = render(hostile, HOSTILE[0])
    assert "<script" not in page
    assert HOSTILE[0] in text_of(page)
    assert HOSTILE[2] in text_of(page)


def test_before_anything_went_well_there_is_a_page_too() -> None:
    page = text_of(render([row(0, outcome="wrong input", reason="no such file")], "home"))
    assert "No target has been refreshed" in page
    assert "no such file" in page
    assert "Refreshes" in text_of(render([], "home"))


def test_a_long_history_is_folded() -> None:
    page = render([row(day) for day in range(40)], "home")
    assert "15 earlier rows" in page


def test_the_page_needs_nothing_else(rows: list[dict[str, Any]]) -> None:
    page = render(rows, "home")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
