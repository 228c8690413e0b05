"""Arms under Ray Train: several workers, a killed worker."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.cluster.telemetry import worker_log
from pipeline.core.storage import Folder
from pipeline.train import ray_train
from pipeline.train.answers import answers_on_test
from pipeline.train.arm import Job
from pipeline.train.evaluate import evaluate_on_test
from pipeline.train.loop import Finetuning
from pipeline.train.ray_train import _Reports, choose_on_test, fit, score_on_test
from pipeline.train.worker_model import _sharing_out

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def alone(job: Callable[..., Job]) -> Callable[..., Finetuning]:
    """alone(**train): an arm of one worker without Ray, at its end."""

    def train(**settings: Any) -> Finetuning:
        finetuning = Finetuning(job(**settings), 0, 1, lambda metrics, snapshot: None)
        finetuning.run()
        return finetuning

    return train


UNEVEN: dict[str, Any] = {"steps": 6, "evaluations": 2, "batch_size": 5, "tokens_per_pass": 32}
"""The workers have several passes a step, and not equally many rows."""


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 4, "cpus_per_worker": 0.25},
        {"workers": 2, "quantize": "nf4"},
        {"workers": 2, "shard": True, "gradient_checkpointing": True, "dtype": "bfloat16"},
        {"workers": 2, "shard": True, "method": "full"},
        {"workers": 3, "min_workers": 1, "cpus_per_worker": 2},
    ],
    ids=["replicated", "base in 4 bits", "shared out, bfloat16", "all weights shared out", "as many as there is room for"],
)
def test_any_number_of_workers_gives_the_curve_of_one(
    settings: dict[str, Any], job: Callable[..., Job], alone: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.ray_train.MAX_FAILURES", 0)  # a second attempt would hide what only the first meets
    storage = Folder.at(bucket if "shard" in settings else tmp_path)
    arm = job(**{"cpus_per_worker": 0.5, **UNEVEN, **settings})
    found = fit(arm, storage)
    kind = {name: settings[name] for name in ("method", "dtype", "quantize") if name in settings}
    one, near = alone(**UNEVEN, **kind), 1e-2 if "dtype" in kind else 1e-4
    assert [row["step"] for row in found["curve"]] == [row["step"] for row in one.curve] == [0, 3, 6]
    for row, expected in zip(found["curve"], one.curve, strict=True):
        assert row["eval_nll"] == pytest.approx(expected["eval_nll"], abs=near)
        assert row["train_nll"] == pytest.approx(expected["train_nll"], abs=near, nan_ok=True)
    weights = "model.safetensors" if settings.get("method") else "adapter_model.safetensors"
    assert storage.exists(f"{found['checkpoint']}/{weights}")
    if settings.get("shard"):
        left = storage.sub(*found["checkpoint"].split("/"))
        plain = evaluate_on_test(arm.base, "float32", arm.data, left)  # bfloat16 rounds PEFT's layers otherwise than ours
        assert score_on_test(arm, {"arm": left}, storage)["arm"] == pytest.approx(plain, abs=near)
        chosen = choose_on_test(arm, {"arm": left}, storage, "choices")["arm"]
        alone_chosen = answers_on_test(arm.base, "float32", arm.data, left, "choices")
        assert chosen.drop_columns(["answer", "score"]).equals(alone_chosen.drop_columns(["answer", "score"]))
        assert chosen["answer"].equals(alone_chosen["answer"]) or "dtype" in kind  # in bfloat16 two may be as likely
    if settings.get("method"):
        assert left.list_files(".pt") == ["trainer_state-0.pt", "trainer_state-1.pt"]
        restored = Finetuning(job(**UNEVEN, **kind), 0, 1, lambda metrics, snapshot: None)
        left.download(left.list_files(), tmp_path)
        restored.restore(tmp_path)
        for weight, expected in zip(restored.trainable.weights, one.trainable.weights, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                ours, theirs = restored.optimizer.state[weight][moment], one.optimizer.state[expected][moment]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "shared out"])
def test_a_worker_that_runs_out_of_memory_leaves_no_other_waiting(
    shard: bool, job: Callable[..., Job], alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second pass of a step. Replicated workers go on together; those that share the weights out start anew."""

    def loop(config: dict[str, Any]) -> None:
        import ray.train
        import torch

        from pipeline.train.ray_train import train_loop
        from pipeline.train.worker_model import Trainable

        loss, passes = Trainable.loss, []

        def limited(self: Any, batch: Any) -> Any:
            passes.append(batch)
            if ray.train.get_context().get_world_rank() == 1 and batch.ids_BT.numel() > 40 and len(passes) > 1:
                raise torch.OutOfMemoryError
            return loss(self, batch)

        Trainable.loss = limited
        train_loop(config)

    monkeypatch.setattr("pipeline.train.ray_train.train_loop", loop)
    settings = {"steps": 4, "evaluations": 2, "batch_size": 16, "tokens_per_pass": 64}
    found = fit(job(workers=2, cpus_per_worker=0.5, shard=shard, **settings), Folder.at(tmp_path))
    assert found["tokens_per_pass"][0] == 64
    assert 1 <= found["tokens_per_pass"][-1] <= 40
    for row, expected in zip(found["curve"], alone(**settings).curve, strict=True):
        assert row["eval_nll"] == pytest.approx(expected["eval_nll"], abs=1e-4)


@pytest.mark.parametrize(("shard", "failures"), [(False, 2), (True, 8)])
def test_smaller_passes_of_workers_that_share_the_weights_out_are_no_failures(
    shard: bool, failures: int, job: Callable[..., Job], tmp_path: Path
) -> None:
    """From 16,384 padded tokens to 256, each size is a start anew."""
    trainer = ray_train._trainer(ray_train.train_loop, {}, job(workers=2, shard=shard), Folder.at(tmp_path), "arm")
    assert trainer.run_config.failure_config.max_failures == failures


def test_no_more_than_one_copy_of_the_state_waits_to_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written, copies, waited = threading.Event(), list[int](), list[bool]()

    def snapshot() -> Callable[[Path], None]:
        copies.append(len(copies))
        return lambda folder: waited.append(written.wait(20))

    monkeypatch.setattr("ray.train.report", lambda metrics, **given: None)
    reports = _Reports(Folder.at(tmp_path), worker_log("train", "arm"))
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


def test_workers_of_a_node_load_a_base_that_they_share_out_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, here, log = threading.Barrier(3), threading.local(), list[str]()
    monkeypatch.setattr("pipeline.train.worker_model.init_device_mesh", lambda *given: None)
    monkeypatch.setattr("torch.distributed.barrier", lambda: barrier.wait(20))
    monkeypatch.setattr("torch.distributed.get_node_local_rank", lambda: here.rank)

    def load(rank: int) -> None:
        here.rank = rank
        with _sharing_out(3):
            log.append(f"{rank} loads")
            time.sleep(0.1)
            log.append(f"{rank} is done")

    threads = [threading.Thread(target=load, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert log == ["0 loads", "0 is done", "1 loads", "1 is done", "2 loads", "2 is done"]


@pytest.mark.long
def test_a_killed_worker_changes_nothing(job: Callable[..., Job], alone: Any, without_time: Any, tmp_path: Path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(tmp_path, "hit", killed))
    killer.start()
    hit = fit(job("hit", steps=40, evaluations=10), Folder.at(tmp_path))
    killer.join()
    assert killed
    assert without_time(hit["curve"]) == without_time(alone(steps=40, evaluations=10).curve)


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
