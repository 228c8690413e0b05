"""Arms under Ray Train: several workers, a killed worker."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.arms import Job
from pipeline.evaluation import evaluate_on_test
from pipeline.finetuning import Finetuning
from pipeline.observe import worker_log
from pipeline.storage import Folder
from pipeline.train import _Reports, fit, score_on_test

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def alone(job: Callable[..., Job]) -> Callable[..., list[dict[str, Any]]]:
    """alone(**train): the curve of one worker without Ray."""

    def train(**settings: Any) -> list[dict[str, Any]]:
        finetuning = Finetuning(job(**settings), 0, 1, lambda metrics, snapshot: None)
        finetuning.run()
        return finetuning.curve

    return train


UNEVEN: dict[str, Any] = {"steps": 6, "evaluations": 2, "batch_size": 5, "tokens_per_pass": 32}
"""The workers have several passes a step, and not equally many rows."""


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 2},
        {"workers": 4, "cpus_per_worker": 0.25},
        {"workers": 2, "shard": True, "gradient_checkpointing": True, "dtype": "bfloat16"},
        {"workers": 2, "shard": True, "method": "full"},
        {"workers": 3, "min_workers": 1, "cpus_per_worker": 2},
    ],
    ids=["replicated", "four", "shared out, bfloat16", "all weights shared out", "as many as there is room for"],
)
def test_any_number_of_workers_gives_the_curve_of_one(
    settings: dict[str, Any], job: Callable[..., Job], alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.MAX_FAILURES", 0)  # a second attempt would hide what only the first meets
    storage = Folder.at(tmp_path)
    arm = job(**{"cpus_per_worker": 0.5, **UNEVEN, **settings})
    found = fit(arm, storage)
    kind = {name: settings[name] for name in ("method", "dtype") if name in settings}
    one, near = alone(**UNEVEN, **kind), 1e-2 if "dtype" in kind else 1e-4
    assert [row["step"] for row in found["curve"]] == [row["step"] for row in one] == [0, 3, 6]
    for row, expected in zip(found["curve"], one, strict=True):
        assert row["eval_nll"] == pytest.approx(expected["eval_nll"], abs=near)
        assert row["train_nll"] == pytest.approx(expected["train_nll"], abs=near, nan_ok=True)
    weights = "model.safetensors" if settings.get("method") else "adapter_model.safetensors"
    assert storage.exists(f"{found['checkpoint']}/{weights}")
    if settings.get("shard"):
        left = storage.sub(*found["checkpoint"].split("/"))
        plain = evaluate_on_test(arm.base, arm.train.dtype, arm.data, left)
        assert score_on_test(arm, {"arm": left}, storage)["arm"] == pytest.approx(plain, abs=near)


def test_no_more_than_one_copy_of_the_state_waits_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written, copies, waited = threading.Event(), list[int](), list[bool]()

    def snapshot() -> Callable[[Path], None]:
        copies.append(len(copies))
        return lambda folder: waited.append(written.wait(20))

    monkeypatch.setattr("ray.train.report", lambda metrics, **given: None)
    reports = _Reports(worker_log("train", "arm"))
    point = {"step": 0, "eval_nll": 1.0}
    reports(point, snapshot)  # comes back while the checkpoint is not written
    second = threading.Thread(target=reports, args=(point, snapshot))
    second.start()
    second.join(0.5)
    assert copies == [0]
    written.set()
    second.join(20)
    assert copies == [0, 1]
    assert waited[0]


def test_a_killed_worker_changes_nothing(job: Callable[..., Job], alone: Any, without_time: Any, tmp_path: Path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(tmp_path, "hit", killed))
    killer.start()
    hit = fit(job("hit", steps=40, evaluations=10), Folder.at(tmp_path))
    killer.join()
    assert killed
    assert without_time(hit["curve"]) == without_time(alone(steps=40, evaluations=10))


def _kill_worker_after_checkpoint(storage: Path, key: str, killed: list[int]) -> None:
    """SIGKILL the process of the training worker, by its id, as soon as a checkpoint is stored."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(storage.glob(f"*-{key}/checkpoint_*")):
            workers = [child for child in psutil.Process().children(recursive=True) if "TrainWorker" in _title(child)]
            if workers:
                killed.append(workers[0].pid)
                workers[0].kill()
                return
        time.sleep(0.02)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
