"""Arms under Ray Train: several workers, a killed worker."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.arms import Job
from pipeline.finetuning import Finetuning
from pipeline.storage import Folder
from pipeline.train import fit

pytestmark = pytest.mark.usefixtures("ray_session")


def test_two_workers_give_the_curve_of_one(job: Callable[..., Job], tmp_path: Path) -> None:
    storage = Folder.at(tmp_path)
    one = fit(job("one"), storage)
    two = fit(job("two", workers=2, cpus_per_worker=0.5), storage)
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] <= b["tokens"] + 512  # each worker pads its own share
        assert a["eval_nll"] == pytest.approx(b["eval_nll"], abs=2e-3)
    assert storage.exists(f"{two['checkpoint']}/adapter_model.safetensors")


def test_workers_that_share_the_weights_out_give_the_curve_of_one(job: Callable[..., Job], tmp_path: Path) -> None:
    """FSDP2, of an adapter on a frozen base and of all weights."""
    for method in ("lora", "full"):
        settings: dict[str, Any] = {"method": method, "steps": 4, "evaluations": 2, "batch_size": 5, "tokens_per_pass": 32}
        alone = Finetuning(job(method, **settings), 0, 1, lambda metrics, save: None)
        alone.run()
        shared = fit(job(method, workers=2, cpus_per_worker=0.5, shard=True, **settings), Folder.at(tmp_path))
        for a, b in zip(alone.curve, shared["curve"], strict=True):
            assert a["eval_nll"] == pytest.approx(b["eval_nll"], abs=1e-4)


def test_a_killed_worker_changes_nothing(job: Callable[..., Job], without_time: Any, tmp_path: Path) -> None:
    storage = Folder.at(tmp_path)
    undisturbed = fit(job("whole", steps=40, evaluations=10), storage)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(tmp_path, "hit", killed))
    killer.start()
    hit = fit(job("hit", steps=40, evaluations=10), storage)
    killer.join()
    assert killed
    assert without_time(hit["curve"]) == without_time(undisturbed["curve"])
    assert hit["best_step"] == undisturbed["best_step"]


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
