"""What is printed at the end of a command, as plain text of a narrow terminal."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType
from run_data import RunData

from pipeline.report.terminal import leaderboard_table, plan_table, summary_table


def printed(what: RenderableType, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue()


def test_the_verdict_and_both_starts_are_printed(run_data: RunData, summary: dict[str, Any]) -> None:
    text = printed(summary_table(summary, run_data.documents["selection.json"]))
    assert "29.3 of 100 steps" in text
    assert "40.2 % slower" in text
    assert all(part in text for part in ("base", "mashup", "64.1 % ± 1.1 %", "66.8 % ± 1.1 %", "5e-4", "runs/medicine/finetuned"))


def test_a_metric_of_ones_own_is_the_first_line_of_the_table(summary: dict[str, Any], add_metric: Callable[..., None]) -> None:
    assert "option likelihood" not in printed(summary_table(summary, None))
    add_metric("choices")
    lines = printed(summary_table(summary, None)).splitlines()
    place = next(n for n, line in enumerate(lines) if "Accuracy by option likelihood on the test split" in line)
    assert re.search(r"25\.0 % +75\.0 %", lines[place])
    assert "Exact match on the test split" in lines[place + 1]


def test_parity_not_reached_is_printed(summary: dict[str, Any], lose_parity: Callable[[dict[str, Any]], None]) -> None:
    lose_parity(summary)
    assert "Parity not reached in 100 steps; 7 min 35 s went into finding" in printed(summary_table(summary, None))


def test_a_start_that_a_hedge_stopped_is_told_as_stopped(hedged: Callable[..., dict[str, Any]]) -> None:
    table = summary_table(hedged("mashup"), None)
    text = printed(table)
    assert text.startswith("The base went on to the end; the mashup of 3 donors was stopped after 33 of 100 steps")
    assert "0.9000 (stopped)" in text
    assert "Cost against a plain finetune: 33.0 % more steps" in text
    assert not re.search("parity|the base's end", text, re.IGNORECASE)
    assert not re.search("the base's end", printed(table, 60))  # nor where each start has a table of its own


def test_a_run_that_starts_from_the_base_has_one_column(summary: dict[str, Any], lose_mashup: Callable[..., None]) -> None:
    lose_mashup(summary)
    text = printed(summary_table(summary, None))
    assert text.startswith("Start from the base: no donor beats the base.")
    assert "mashup" not in text


@pytest.mark.parametrize("starts", [1, 2, 3, 6, 40])
def test_starts_that_find_no_room_stand_below(summary: dict[str, Any], starts: int) -> None:
    """No cell is broken over lines, and each start is there once."""
    names = [f"start_number_{number}" for number in range(starts)]
    arms = dict.fromkeys(names, summary["inits"]["base"])
    text = printed(summary_table(summary | {"inits": arms}, None), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert [word for word in text.split() if word in names] == names
    assert text.count("64.1 % ± 1.1 %") == starts
    assert len(re.findall(r"\(step \d+\)", text)) == starts


def test_ids_are_not_read_as_markup(make_run: Callable[..., RunData]) -> None:
    documents = make_run(hostile=True).documents
    documents["selection.json"]["donors"][0]["adapter_id"] = "[red]x[/red]\x1b[31m"
    assert "[red]x[/red] [31m" in printed(summary_table(documents["summary.json"], documents["selection.json"]))


def test_the_leaderboard_prints_whole_ids_and_the_base(run_data: RunData) -> None:
    table = run_data.tables["leaderboard.parquet"]
    text = printed(leaderboard_table(table))
    place = table["adapter_id"].to_pylist().index("base") + 1
    assert place > 25
    assert f"{place}   base" in text
    assert "pool/natural-questions-open-short-answers-r16-seed0" in text
    assert "8 more places in leaderboard.parquet" in text


def test_the_leaderboard_fits_a_narrow_terminal(run_data: RunData) -> None:
    text = printed(leaderboard_table(run_data.tables["leaderboard.parquet"]), width=80)
    assert "−0.9300 ± 0.0294" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_prints_what_is_known_and_a_dash_for_what_is_not() -> None:
    cost = {"seconds": 100.0, "gpu_hours": 0.25, "thread_hours": 2.0}
    unknown = dict.fromkeys(cost)
    plan = {
        "candidates": {"found": 40, "valid": 34, "in_the_race": 17},
        "adapter_samples": {"all": 2304, "in_store": 204, "at_most": 1100},
        "tokens": {"search": 112_000, "merge": 9000, "train": 350_000},
        "fetch": {"adapters": 3, "bytes": 8_400_000, "bytes_at_most": 16_800_000},
        "engines": {"count": 2, "memory_bytes": {"weights": 5 * 10**8, "adapters": 10**7, "cache": 0, "total": 51 * 10**7}},
        "arms": {"count": 4, "at_once": 2},
        "stages": {"search": cost, "compare": unknown},
        "total": unknown,
        "notes": ["arms may end early: train.patience"],
        "pays": {"past_runs": 0, "overhead_seconds": None, "base_seconds": None},
    }
    text = printed(plan_table(plan))
    assert "34 valid of 40; 17 in the race" in text
    assert "2,304, of which 204 are in the store; at most 1,100 are left to score" in text
    assert "at most 3 adapters, 8.4 MB to a node, 16.8 MB to all" in text
    assert "2, each with at least 510.0 MB of memory: weights 500.0 MB, adapters 10.0 MB" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith(("search", "total"))] == [
        ["search", "1", "min", "40", "s", "0.25", "2"],
        ["total", "–", "–", "–"],
    ]
    assert "Note: arms may end early: train.patience." in text
    assert "Whether it pays is not known" in text
    assert "Whether it pays" not in printed(plan_table({name: value for name, value in plan.items() if name != "pays"}))
