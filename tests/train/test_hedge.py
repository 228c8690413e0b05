"""The rule of a hedge, without Ray. With it: tests/train/test_tune.py, and whole runs in tests/test_run.py."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.storage import Folder
from pipeline.train.arm import HELD_FILE, RESULT_FILE, Arm, Job
from pipeline.train.hedge import LEAST_WAIT, Hedge, Wait, cost, decide, decision_step

NAN = math.nan


@pytest.fixture
def jobs(job: Callable[..., Job]) -> list[Job]:
    """Both starts at two rates."""
    arms = [Arm(init, lr, 0) for init in ("base", "mashup") for lr in (1e-3, 1e-2)]
    return [replace(job(), arm=arm) for arm in arms]


@pytest.fixture
def hedge(jobs: list[Job], tmp_path: Path) -> Hedge:
    return Hedge(jobs, Folder.at(tmp_path), 2)


@pytest.mark.parametrize("steps", [3, 4, 5, 24, 100])
def test_the_stopped_arm_costs_a_third_at_most(steps: int) -> None:
    assert 1 <= decision_step(steps) <= steps / 3


@pytest.mark.parametrize(
    ("base", "mashup", "winner"),
    [
        ([2.0, 1.5], [1.6, 1.4], "mashup"),
        ([2.0, 1.5], [1.6, 1.6], "base"),  # the best rate of each counts
        ([1.5], [1.5], "base"),
        ([NAN, 1.5], [math.inf, 1.4], "mashup"),
        ([NAN], [9.0], "mashup"),
        ([9.0], [NAN], "base"),
    ],
)
def test_the_lower_loss_at_the_best_rate_goes_on(base: list[float], mashup: list[float], winner: str) -> None:
    decision = decide({"base": base, "mashup": mashup}, 8)
    assert (decision["winner"], decision["step"]) == (winner, 8)
    assert {decision["winner"], decision["stopped"]} == {"base", "mashup"}


def test_a_start_of_which_every_arm_diverged_has_no_loss() -> None:
    assert decide({"base": [1.5], "mashup": [NAN, math.inf]}, 8)["validation_nll"] == {"base": 1.5, "mashup": None}


def test_what_it_cost_is_told_against_the_start_that_went_on() -> None:
    def outcome(init: str, step: int) -> dict[str, Any]:
        return {"init": init, "curve": [{"step": 0}, {"step": step, "tokens": 100 * step, "seconds": step / 2}]}

    found = cost([outcome("base", 8), outcome("base", 8), outcome("mashup", 24), outcome("mashup", 24)], {"winner": "mashup"})
    assert found["step"] == {"spent": 64, "plain": 48, "more": pytest.approx(1 / 3)}
    assert found["tokens"]["plain"] == 4800
    assert found["seconds"]["spent"] == 32


def test_the_last_arm_brings_the_decision_and_it_stays(hedge: Hedge, jobs: list[Job]) -> None:
    for job, nll in zip(jobs[:3], (2.0, 1.5, 1.4), strict=True):
        hedge.note(job.name, nll)
        assert hedge.decision is None
    hedge.note(jobs[3].name, 3.0)
    assert hedge.decision == decide({"base": [2.0, 1.5], "mashup": [1.4, 3.0]}, 2)
    hedge.note(jobs[0].name, 0.1)  # an attempt that began at the step says it again
    assert hedge.decision["winner"] == "mashup"


def leave(folder: Path, job: Job, file: str, **outcome: Any) -> None:
    curve = [{"step": 0, "eval_nll": 5.0}, {"step": 2, "eval_nll": job.arm.lr}]
    Folder.at(folder).write_json(f"{job.name}/{file}", {"init": job.arm.init, "curve": curve, "diverged_at": None, **outcome})


def test_what_arms_have_left_is_enough_to_decide(hedge: Hedge, jobs: list[Job], tmp_path: Path) -> None:
    """As after a kill; one arm diverged before the step and is at its end."""
    for job in jobs[1:]:
        leave(tmp_path, job, HELD_FILE)
    hedge.look()
    assert hedge.decision is None
    assert [hedge.has_ended(job) for job in jobs] == [False, True, True, True]
    leave(tmp_path, jobs[0], RESULT_FILE, curve=[{"step": 0, "eval_nll": 5.0}, {"step": 1, "eval_nll": 0.0}], diverged_at=1)
    hedge.look()
    assert hedge.decision is not None
    assert hedge.decision["winner"] == "mashup"
    assert hedge.decision["validation_nll"] == {"base": 1e-2, "mashup": 1e-3}
    assert [hedge.has_ended(job) for job in jobs] == [True, True, False, False]  # those that go on had given up their places
    assert [hedge.outcome(job).get("stopped_at") for job in jobs[:2]] == [None, 2]


def test_other_arms_have_another_decision(hedge: Hedge, jobs: list[Job], tmp_path: Path) -> None:
    assert Hedge([replace(job, key="other") for job in jobs], Folder.at(tmp_path), 2).file != hedge.file


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_who_has_a_place_beside_its_rivals_waits_as_long_as_it_took_to_come(hedge: Hedge, jobs: list[Job]) -> None:
    wait = Wait(hedge.hold_of(jobs[0], beside=True), clock := Clock())
    clock.time += 10 * LEAST_WAIT
    assert wait() is None
    clock.time += 10 * LEAST_WAIT - 1
    assert wait() is None
    clock.time += 2
    assert wait() is False  # its rival has no place, it seems: it gives up its own


def test_who_has_none_beside_gives_up_its_place_but_for_the_last(hedge: Hedge, jobs: list[Job], tmp_path: Path) -> None:
    assert Wait(hedge.hold_of(jobs[0], beside=False))() is False
    for job in jobs[:3]:
        leave(tmp_path, job, HELD_FILE)
    assert Wait(hedge.hold_of(jobs[3], beside=False))() is None


@pytest.mark.parametrize("beside", [True, False])
def test_once_it_is_decided_everybody_knows(hedge: Hedge, jobs: list[Job], beside: bool) -> None:
    for job in jobs:
        hedge.note(job.name, 2.0 if job.arm.init == "base" else 1.0)
    assert [Wait(hedge.hold_of(job, beside))() for job in jobs] == [False, False, True, True]
