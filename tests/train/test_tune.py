"""Arms side by side: which of them are trained. How one is trained: tests/train/test_ray_train.py and test_tracking.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.train import tune
from pipeline.train.arm import HELD_FILE, RESULT_FILE, STATE, Arm, Job
from pipeline.train.hedge import Hedge


@pytest.fixture
def jobs(job: Callable[..., Job]) -> list[Job]:
    return [replace(job(), arm=Arm("base", 1e-3, seed)) for seed in range(3)]


def test_an_arm_that_has_a_result_is_not_trained_again(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def train(todo: Sequence[Job], storage: Folder, callbacks: list[Any], hedge: Hedge | None) -> None:
        for one in todo:
            trained.append(one.arm.seed)
            storage.write_text(f"{one.name}/checkpoint_1/{STATE}-0.pt", "moments")
            result = {"seed": one.arm.seed, "checkpoint": f"{one.name}/checkpoint_1"}
            storage.write_json(f"{one.name}/{tune.RESULT_FILE}", result)

    monkeypatch.setattr(tune, "_tune", train)
    storage = Folder.at(tmp_path)
    tune.train_arms(jobs[1:2], storage, print, "run")
    found = tune.train_arms(jobs, storage, print, "run")
    assert [outcome["seed"] for outcome in found] == [0, 1, 2]
    assert trained == [1, 0, 2]
    assert not list(tmp_path.rglob(f"{STATE}*"))  # nobody goes on with them


@pytest.mark.usefixtures("ray_session")
def test_an_arm_is_steered_from_the_head_and_may_have_all_cpus(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of any other node ends no arm."""

    def drive(trial: dict[str, Any], jobs: dict[str, Job], storage: Folder, holds: dict[str, Any]) -> None:
        context, name = ray.get_runtime_context(), trial["arm"]["name"]
        found = {"node": context.get_node_id(), "asked": context.get_assigned_resources(), "checkpoint": f"{name}/best"}
        storage.write_json(f"{name}/result.json", found)

    monkeypatch.setattr(tune, "require_workers", lambda train: None)
    monkeypatch.setattr(tune, "arms_at_once", lambda train, arms: 1)
    monkeypatch.setattr(tune, "_drive", drive)
    (outcome,) = tune.train_arms(jobs[:1], Folder.at(tmp_path), print, "run")
    head = next(node["NodeID"] for node in ray.nodes() if tune.HEAD in node["Resources"])
    assert outcome["node"] == head
    assert "CPU" not in outcome["asked"]


@pytest.mark.usefixtures("ray_session")
def test_arms_that_run_one_after_the_other_are_steered_by_one_process(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drive(trial: dict[str, Any], jobs: dict[str, Job], storage: Folder, holds: dict[str, Any]) -> None:
        name = trial["arm"]["name"]
        storage.write_json(f"{name}/result.json", {"process": os.getpid(), "name": name, "checkpoint": f"{name}/best"})

    monkeypatch.setattr(tune, "require_workers", lambda train: None)
    monkeypatch.setattr(tune, "arms_at_once", lambda train, arms: 1)
    monkeypatch.setattr(tune, "_drive", drive)
    outcomes = tune.train_arms(jobs, Folder.at(tmp_path), print, "run")
    assert [outcome["name"] for outcome in outcomes] == [job.name for job in jobs]
    assert len({outcome["process"] for outcome in outcomes}) == 1


def test_arms_that_cannot_be_quantised_are_not_begun(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.quantised_base.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(tune, "_tune", lambda *given: pytest.fail("begun"))
    with pytest.raises(InputError, match="install bitsandbytes"):
        tune.train_arms([job(quantize="nf4")], Folder.at(tmp_path), print, "run")


def test_arms_that_failed_are_counted_and_one_is_quoted(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "require_workers", lambda train: None)
    monkeypatch.setattr(tune, "arms_at_once", lambda train, arms: 1)
    monkeypatch.setattr(tune.tune.Tuner, "fit", lambda tuner: SimpleNamespace(errors=[RuntimeError("the disk is full")]))
    with pytest.raises(RuntimeError, match=r"1 of 3 training arms failed: .*the disk is full"):
        tune.train_arms(jobs, Folder.at(tmp_path), print, "run")


def test_an_evaluation_is_said_as_it_comes(jobs: list[Job]) -> None:
    said: list[str] = []
    follow = tune._Follow(said.append, "run", steps=8)
    trial = SimpleNamespace(config={"arm": {"name": jobs[0].name}})
    follow.on_trial_result(1, [], trial, {"step": 4, "eval_nll": 1.5, "tokens": 10, "seconds": 2.0})
    follow.on_trial_result(1, [], trial, {"done": True})
    assert said == [f"{jobs[0].name}: step 4/8, validation NLL 1.5000, 2 s of training"]


@pytest.fixture
def rivals(
    job: Callable[..., Job], tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> Callable[..., list[Job]]:
    """rivals(**train): base, and a mashup of random weights, at a rate at which it never learns."""
    random = Folder.at(make_adapter(tmp_path / "random", tiny_base, rank=4, targets=["q_proj", "v_proj", "down_proj"], std=3.0))

    def make(**train: Any) -> list[Job]:
        settings = {"steps": 6, "evaluations": 3, **train}
        mashup = replace(job("m", **settings), arm=Arm("mashup", 1e-30, 0), start=random)
        return [job("b", **settings), mashup]

    return make


def steps_of(outcome: dict[str, Any]) -> list[int]:
    return [point["step"] for point in outcome["curve"]]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("cpus", [1, pytest.param(2.5, marks=pytest.mark.long)], ids=["side by side", "one after the other"])
def test_the_arm_that_is_behind_at_a_third_is_stopped_there_and_the_other_goes_on_as_it_would_alone(
    rivals: Callable[..., list[Job]], cpus: float, tmp_path: Path, without_time: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side in one go; else the base gives up its place and takes it up again."""
    rounds: list[int] = []
    real = tune._tune
    monkeypatch.setattr(tune, "_tune", lambda todo, *given: (rounds.append(len(todo)), real(todo, *given)))
    jobs, storage, said = rivals(cpus_per_worker=cpus), Folder.at(tmp_path / "train"), list[str]()
    base, mashup = tune.train_arms(jobs, storage, said.append, "run", decide_at=2)
    assert (steps_of(base), steps_of(mashup)) == ([0, 2, 4, 6], [0, 2])
    assert (base.get("stopped_at"), mashup["stopped_at"]) == (None, 2)
    assert "after step 2: the base goes on, the mashup is stopped" in said
    assert rounds == ([2] if cpus == 1 else [2, 1])
    (alone,) = tune.train_arms(jobs[:1], Folder.at(tmp_path / "alone"), print, "run")
    assert without_time(base["curve"]) == without_time(alone["curve"])
    assert not list((tmp_path / "train").rglob(f"{STATE}*"))  # nobody goes on with them
    tune.train_arms(jobs, storage, print, "run", decide_at=2)
    assert len(rounds) == (2 if cpus == 1 else 3)  # with that of the arm alone: nothing is trained again


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_hedge_that_broke_off_before_its_decision_goes_on_from_the_checkpoints(
    rivals: Callable[..., list[Job]], tmp_path: Path, without_time: Any
) -> None:
    """One arm had given up its place, the other was killed at the step: the attempt that is made now says where it stands."""
    jobs, storage = rivals(cpus_per_worker=2.5), Folder.at(tmp_path / "train")
    whole = tune.train_arms(jobs, Folder.at(tmp_path / "whole"), print, "run", decide_at=2)
    tune._tune(jobs, storage, [], Hedge(jobs, storage, 2))
    assert storage.is_complete(f"{jobs[0].name}/{HELD_FILE}")
    for file in (Hedge(jobs, storage, 2).file, f"{jobs[1].name}/{HELD_FILE}"):
        storage.delete(file)
    outcomes = tune.train_arms(jobs, storage, print, "run", decide_at=2)
    assert [without_time(one["curve"]) for one in outcomes] == [without_time(one["curve"]) for one in whole]
    assert not storage.exists(f"{jobs[1].name}/{RESULT_FILE}")


def test_an_arm_that_diverges_at_the_step_of_the_decision_does_not_go_on(
    rivals: Callable[..., list[Job]], tmp_path: Path
) -> None:
    jobs = rivals()
    decider = tune._Decider(hedge := Hedge(jobs, Folder.at(tmp_path), 2))
    for job, result in zip(jobs, ({"eval_nll": 1.0, "diverged": True}, {"eval_nll": 2.0}), strict=True):
        assert (
            decider.on_trial_result(None, SimpleNamespace(config={"arm": {"name": job.name}}), {"step": 2, **result})
            == "CONTINUE"
        )
    assert hedge.decision is not None
    assert (hedge.decision["winner"], hedge.decision["validation_nll"]["base"]) == ("mashup", None)


@pytest.mark.long
def test_the_loss_of_the_node_that_trains_costs_an_arm_nothing_but_time(tiny_base: str, data: Folder, tmp_path: Path) -> None:
    found = {}
    for fault in ("none", "node"):
        command = [sys.executable, str(Path(__file__).with_name("lost_node.py")), str(tmp_path), tiny_base, data.uri, fault]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[fault] = json.loads((tmp_path / f"{fault}.json").read_text())
    assert (found["none"]["nodes"], found["node"]["nodes"]) == (1, 2)
    assert [row["step"] for row in found["node"]["curve"]] == [0, 2, 4, 6, 8]
    assert json.dumps(found["node"]) == json.dumps(found["none"] | {"nodes": 2})  # as text, in which NaN is NaN
