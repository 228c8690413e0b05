"""What the comparison concludes from curves: the chosen learning rate, parity, and wall-clock with its overhead."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.cluster.resources import MOST_AHEAD, NODE_GROUP
from pipeline.config import TrainConfig
from pipeline.core.storage import Folder
from pipeline.train import curves
from pipeline.train.arm import Job
from pipeline.train.curves import _chosen, parity, with_overhead
from pipeline.train.hedge import decide
from pipeline.train.ray_train import arms_at_once


def arm(init: str, losses: list[float], *, lr: float = 1e-4, seed: int = 0, diverged_at: int | None = None) -> dict[str, Any]:
    """An outcome with an evaluation every ten steps and a second a step."""
    curve = [{"step": 10 * n, "seconds": 10.0 * n, "eval_nll": loss} for n, loss in enumerate(losses)]
    return {"name": f"{init}-{lr}-{seed}", "init": init, "lr": lr, "seed": seed, "curve": curve, "diverged_at": diverged_at}


def test_parity_is_interpolated_between_evaluations() -> None:
    found = parity([arm("base", [3.0, 2.0, 1.0])], [arm("mashup", [2.0, 1.5, 0.5])])
    assert found["steps"] == pytest.approx(15.0)
    assert found["train_seconds"] == pytest.approx(15.0)
    assert found["steps_saved"] == pytest.approx(0.25)
    assert found["target_nll"] == 1.0


def test_parity_over_seeds_is_that_of_the_mean_curves() -> None:
    base = [arm("base", [3.0, 1.0], seed=0), arm("base", [3.0, 1.4], seed=1)]
    mashup = [arm("mashup", [2.0, 0.8], seed=0), arm("mashup", [2.0, 1.5], seed=1)]
    found = parity(base, mashup)
    assert found["target_nll"] == pytest.approx(1.2)
    assert found["steps"] == pytest.approx(10 * 0.8 / 0.85)
    assert found["steps_by_seed"] == [pytest.approx(10 * 1.0 / 1.2), None]


def test_parity_is_not_reached_where_the_mean_does_not() -> None:
    base = [arm("base", [3.0, 1.0], seed=0), arm("base", [3.0, 1.0], seed=1)]
    mashup = [arm("mashup", [2.0, 0.9], seed=0), arm("mashup", [2.0, 1.2], seed=1)]
    found = parity(base, mashup)
    assert (found["reached"], found["steps"], found["steps_saved"], found["train_seconds"]) == (False, None, None, None)


def test_an_arm_that_ended_early_stays_where_it_ended() -> None:
    base = [arm("base", [3.0, 2.0, 1.0], seed=seed) for seed in (0, 1)]
    mashup = [arm("mashup", [2.0, 1.1], seed=0), arm("mashup", [2.0, 1.5, 0.7], seed=1)]
    found = parity(base, mashup)
    assert found["steps"] == pytest.approx(10 + 10 * 0.3 / 0.4)
    assert found["train_seconds"] == pytest.approx((10 + found["steps"]) / 2)


def test_a_start_below_the_target_is_at_parity_at_once() -> None:
    assert parity([arm("base", [3.0, 2.0])], [arm("mashup", [1.0, 0.5])])["steps"] == 0.0


def test_overhead_is_paid_by_the_mashup_alone() -> None:
    found = with_overhead(parity([arm("base", [3.0, 1.0])], [arm("mashup", [1.0, 0.5])]), overhead_seconds=25.0)
    assert found["seconds"] == 25.0
    assert found["seconds_saved"] == pytest.approx(-1.5)


def test_overhead_of_a_parity_not_reached_is_not_a_number() -> None:
    found = with_overhead(parity([arm("base", [3.0, 1.0])], [arm("mashup", [2.0, 1.5])]), overhead_seconds=25.0)
    assert found["seconds"] is None
    assert found["seconds_saved"] is None


@pytest.mark.parametrize(("base_seconds", "train_seconds", "overhead"), [(100.0, 30.0, 35.0), (40.0, 10.0, 90.0)])
def test_at_the_break_even_both_starts_take_as_long(base_seconds: float, train_seconds: float, overhead: float) -> None:
    known = {"train_seconds": train_seconds, "base_seconds": base_seconds}
    even = with_overhead(known, overhead)["break_even_seconds"]
    longer = {"train_seconds": even * train_seconds / base_seconds, "base_seconds": even}
    assert with_overhead(longer, overhead)["seconds"] == pytest.approx(even)


@pytest.mark.parametrize("train_seconds", [None, 100.0, 120.0])
def test_a_mashup_that_saves_no_training_time_never_pays(train_seconds: float | None) -> None:
    assert with_overhead({"train_seconds": train_seconds, "base_seconds": 100.0}, 5.0)["break_even_seconds"] is None


def test_validation_picks_the_rate_by_the_mean_over_seeds() -> None:
    arms = [
        arm("base", [3.0, 1.0], lr=1e-4, seed=0),
        arm("base", [3.0, 2.0], lr=1e-4, seed=1),
        arm("base", [3.0, 1.2], lr=5e-4, seed=0),
        arm("base", [3.0, 1.2], lr=5e-4, seed=1),
    ]
    assert [(one["lr"], one["seed"]) for one in _chosen(arms)] == [(5e-4, 0), (5e-4, 1)]


def test_a_rate_that_diverged_is_never_picked() -> None:
    arms = [arm("base", [3.0, 0.1], lr=1.0, diverged_at=10), arm("base", [3.0, 2.0], lr=1e-4)]
    assert [one["lr"] for one in _chosen(arms)] == [1e-4]


def test_an_init_that_diverged_everywhere_is_an_error_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="add a lower one"):
        _chosen([arm("base", [3.0], lr=1.0, diverged_at=1)])


@pytest.fixture
def compared(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """compared(base, mashup): the summary of a hedge between arms with these losses, the mashup's stopped at step 10."""

    def tested(job: Job, checkpoints: dict[str, Folder], storage: Folder) -> Iterator[tuple[str, dict[str, float]]]:
        yield from ((name, dict.fromkeys(curves.TEST_METRICS, 0.5)) for name in checkpoints)

    def compare(base: list[float], mashup: list[float], diverged_at: int | None = None) -> dict[str, Any]:
        outcomes = [arm("base", base), arm("mashup", mashup, diverged_at=diverged_at)]
        extra = {"startup_seconds": 1.0, "best_step": 10}
        whole = [{**one, **extra, "checkpoint": f"{one['name']}/last"} for one in outcomes]
        whole[1]["stopped_at"] = 10
        for one in whole:
            one["curve"] = [{**point, "tokens": 7 * point["step"], "init": one["init"]} for point in one["curve"]]
        decision = decide({"base": base[1:2], "mashup": [math.nan] if diverged_at else mashup[1:2]}, 10)
        return curves.compare_arms([job(steps=30)], whole, Folder.at(tmp_path / "train"), decision)[1]

    monkeypatch.setattr(curves, "_tested", tested)
    return compare


def test_a_hedge_tells_who_won_and_its_cost_but_no_parity(compared: Callable[..., dict[str, Any]]) -> None:
    found = compared([3.0, 2.0, 1.5, 1.0], [2.5, 2.2])
    assert "parity" not in found
    assert "parity_steps" not in found["inits"]["base"]
    hedge = found["hedge"]
    assert (hedge["winner"], hedge["stopped"], hedge["kept"], hedge["step"], hedge["steps"]) == ("base", "mashup", "base", 10, 30)
    assert hedge["validation_nll"] == {"base": 2.0, "mashup": 2.2}
    assert hedge["cost"]["tokens"] == {"spent": 280.0, "plain": 210.0, "more": pytest.approx(1 / 3)}
    assert found["inits"]["mashup"]["stopped_at"] == 10
    assert "test_nll" not in found["inits"]["mashup"]  # nobody asks for it
    assert found["inits"]["base"]["test_nll"]["mean"] == 0.5


def test_weights_of_the_stopped_start_are_kept_where_they_are_the_better_ones(compared: Callable[..., dict[str, Any]]) -> None:
    found = compared([3.0, 2.0, 2.5, 2.6], [0.5, 2.2])
    assert (found["hedge"]["winner"], found["hedge"]["kept"]) == ("base", "mashup")
    assert found["inits"]["mashup"]["test_nll"]["mean"] == 0.5


def test_a_start_that_diverged_before_the_decision_is_no_error(compared: Callable[..., dict[str, Any]]) -> None:
    found = compared([3.0, 2.0, 1.5, 1.0], [2.5], diverged_at=5)
    assert found["inits"].keys() == {"base"}
    assert found["hedge"]["validation_nll"] == {"base": 2.0, "mashup": None}


def test_what_is_tested_is_not_tested_again(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But on other rows it is."""
    asked: list[str] = []

    def tested(job: Job, checkpoints: dict[str, Folder], storage: Folder) -> Iterator[tuple[str, dict[str, float]]]:
        asked.extend(checkpoints)
        found = {"test_nll": 1.0, "test_token_accuracy": 0.5, "test_exact_match": 0.25, "test_answer_match": 0.5}
        yield from ((name, found) for name in checkpoints)

    monkeypatch.setattr(curves, "_tested", tested)
    one, data, storage = job(), Folder.at(tmp_path / "data"), Folder.at(tmp_path / "train")
    for split in ("train", "validation", "test"):
        data.write_bytes(f"{split}.parquet", one.data.read_bytes(f"{split}.parquet"))
    one = replace(one, data=data)
    outcomes = [{**arm("base", [3.0, 1.0], seed=seed), "startup_seconds": 1.0, "best_step": 10} for seed in (0, 1)]
    outcomes = [{**outcome, "checkpoint": f"{outcome['name']}/last"} for outcome in outcomes]
    names = [outcome["name"] for outcome in outcomes]

    def tested_now(count: int) -> list[str]:
        asked.clear()
        summary = curves.compare_arms([one], outcomes[:count], storage)[1]
        assert summary["inits"]["base"]["test_exact_match"]["mean"] == 0.25
        assert [one["test_answer_match"] for one in summary["inits"]["base"]["test_by_seed"]] == [0.5] * count
        return list(asked)

    assert tested_now(1) == names[:1]
    assert tested_now(2) == names[1:]
    data.write_table("test.parquet", data.read_table("test.parquet").slice(1))
    assert tested_now(2) == names


def test_all_arms_wait_for_nodes_that_an_autoscaler_may_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head of a cluster that starts from zero; then with a node for two workers."""
    head = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    train = TrainConfig(workers=2, gpus_per_worker=1)
    assert arms_at_once(train, 12) == 1
    head["Labels"] = {NODE_GROUP: "head"}
    assert arms_at_once(train, 12) == 12
    assert arms_at_once(train, 1000) == MOST_AHEAD
    node = {"Alive": True, "Resources": {"CPU": 96.0, "GPU": 80.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, node])
    assert arms_at_once(train, 1000) == 40
