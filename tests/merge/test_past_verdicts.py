"""What past runs foretell: nothing of a few, then a share with its interval and an expected gain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, TargetConfig
from pipeline.merge.past_verdicts import FEWEST, foretell, foretell_decision, foretell_verdict, keep_verdict, measure
from pipeline.run_folder import Run

CHOICE = {"recipe": {"name": "exact-1"}, "candidates": [{"name": "exact-1", "holdout_nll_minus_base": -0.5}]}


def outcome(init: str, losses: list[float], **more: Any) -> dict[str, Any]:
    curve = [{"step": 6 * n, "eval_nll": loss} for n, loss in enumerate(losses)]
    return {"name": init, "init": init, "lr": 1e-3, "seed": 0, "diverged_at": None, "curve": curve, **more}


BOTH = [outcome("base", [4.0, 2.0, 1.5, 1.2, 1.3]), outcome("mashup", [2.0, 1.4, 1.1, 1.0, 1.0])]


def test_of_a_few_runs_nothing_is_concluded() -> None:
    assert foretell([(-1.0, 0.2)] * (FEWEST - 1), -1.0) == {"runs": FEWEST - 1}


def test_the_gain_follows_the_line_and_is_not_drawn_beyond_what_was_seen() -> None:
    differences = np.linspace(-2.0, -0.2, 10)
    past = [(float(one), float(-0.3 * one - 0.15)) for one in differences]
    found = foretell(past, -1.0)
    assert found["gain"] == pytest.approx(0.15)
    assert found["spread"] == pytest.approx(0.0, abs=1e-9)
    assert (found["runs"], found["right"]) == (10, 8)  # the two smallest differences came to nothing
    assert found["interval"] == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson's, of 8 of 10
    assert foretell(past, -50.0)["gain"] == pytest.approx(0.45)


def test_a_difference_that_was_always_the_same_promises_the_mean() -> None:
    found = foretell([(-1.0, gain) for gain in (0.1, 0.3) * 4], -1.0)
    assert found["gain"] == pytest.approx(0.2)
    assert found["right"] == 8


def test_a_difference_for_the_base_is_right_where_the_base_won() -> None:
    assert foretell([(0.3, -0.1)] * 6 + [(0.3, 0.1)] * 2, 0.3)["right"] == 6


def test_what_is_measured_of_a_run() -> None:
    found = measure(CHOICE, BOTH)
    assert found["holdout"] == -0.5
    assert found["third"] == pytest.approx((1.4 * 2 + 1.1) / 3 - (2.0 * 2 + 1.5) / 3)  # step 8, between 6 and 12
    assert found["gain"] == pytest.approx(0.2)


def runs(tiny_base: str, folder: Path, count: int) -> list[Run]:
    """Of as many targets, with one score store."""
    made = []
    for number in range(count):
        target = TargetConfig(train=str(folder / f"{number}.jsonl"))
        config = Config(run=str(folder / str(number)), base=tiny_base, pool="pool", target=target)
        search = config.search.model_copy(update={"store": str(folder / "store"), "engine": "transformers", "dtype": "float32"})
        made.append(Run(config.model_copy(update={"search": search})))
    return made


def test_a_run_learns_from_runs_on_other_targets(tiny_base: str, tmp_path: Path) -> None:
    *others, own = runs(tiny_base, tmp_path, FEWEST + 1)
    for run in others:
        keep_verdict(run, CHOICE, BOTH)
        sampled = run.config.search.model_copy(update={"samples": 12})  # at other settings it is the same task, and counts once
        keep_verdict(Run(run.config.model_copy(update={"search": sampled})), CHOICE, BOTH)
    keep_verdict(own, CHOICE, BOTH)
    found = foretell_verdict(own, -0.5)
    assert (found["runs"], found["right"], found["gain"]) == (FEWEST, FEWEST, pytest.approx(0.2))
    stopped = [outcome("base", [4.0, 2.0], stopped_at=6), BOTH[1]]
    assert foretell_decision(own, stopped)["foretold"]["right"] == FEWEST
    assert foretell_decision(own, BOTH) == {}  # nothing was decided


@pytest.mark.parametrize(
    "outcomes", [BOTH[:1], [outcome("base", [4.0, 2.0], stopped_at=6), BOTH[1]]], ids=["no mashup", "a hedge"]
)
def test_a_run_that_did_not_train_both_to_the_end_teaches_nothing(
    tiny_base: str, tmp_path: Path, outcomes: list[dict[str, Any]]
) -> None:
    one, other = runs(tiny_base, tmp_path, 2)
    keep_verdict(one, CHOICE, outcomes)
    assert foretell_verdict(other, -0.5) == {"runs": 0}
