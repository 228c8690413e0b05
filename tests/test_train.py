"""The training loop: its order, its loss, going on from a checkpoint, several workers, a killed worker."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import TrainConfig
from pipeline.samples import tokenise
from pipeline.storage import Folder
from pipeline.tables import SAMPLES
from pipeline.train import Arm, Finetuning, Job, Lora, Rows, as_metrics, batch_places, evaluate, evaluation_steps, fit

WORDS = ["fox", "dog", "river", "hotel", "review", "France", "Paris", "number"]


@pytest.fixture(scope="module")
def data(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Splits of a task that a few steps can learn: repeat the last word."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [{"prompt": f"{a} and {b}", "completion": b} for a in WORDS for b in WORDS]
    folder = Folder.at(tmp_path_factory.mktemp("data"))
    for split, part in {"train": rows[8:], "validation": rows[:8], "test": rows[:4]}.items():
        tokens = [{"sample_id": str(n), "split": split, **tokenise(row, tokenizer)} for n, row in enumerate(part)]
        folder.write_table(f"{split}.parquet", pa.Table.from_pylist(tokens, schema=SAMPLES))
    return folder


@pytest.fixture
def job(tiny_base: str, data: Folder) -> Callable[..., Job]:
    def make(key: str = "k", **train: Any) -> Job:
        settings = {"steps": 8, "batch_size": 8, "evaluations": 4, "dtype": "float32", "cpus_per_worker": 1, **train}
        lora = Lora(4, 8.0, ("q_proj", "v_proj", "down_proj"))
        return Job(Arm("base", 1e-2, 0), tiny_base, lora, TrainConfig(**settings), data, data, key)

    return make


class Checkpoints:
    """Stands in for Ray: keeps what a loop reports."""

    def __init__(self, folder: Path):
        self.folder, self.points = folder, []

    def __call__(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        self.points.append(metrics)
        assert checkpoint is not None
        target = self.folder / str(metrics["step"])
        target.mkdir(parents=True)
        for file in checkpoint.iterdir():
            (target / file.name).write_bytes(file.read_bytes())


def without_time(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(v, 4) for key, v in row.items() if key not in ("seconds", "init") and v == v} for row in curve]


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    places = [place for step in range(6) for place in batch_places(step, batch_size=5, n_rows=10, seed=3)]
    epochs = [places[:10], places[10:20], places[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert places[:10] != [p for step in range(2) for p in batch_places(step, 5, 10, seed=4)]


def test_evaluations_are_at_the_start_and_evenly_to_the_end() -> None:
    assert evaluation_steps(24, 6) == [0, 4, 8, 12, 16, 20, 24]
    assert evaluation_steps(3, 10) == [0, 1, 2, 3]


def test_training_learns_and_reports_every_evaluation(job: Callable[..., Job], tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    Finetuning(job(), 0, 1, kept).run()
    assert [point["step"] for point in kept.points] == [0, 2, 4, 6, 8]
    assert kept.points[-1]["eval_nll"] < kept.points[0]["eval_nll"] - 0.3
    assert kept.points[-1]["tokens"] > 0


def test_first_loss_equals_that_of_transformers(job: Callable[..., Job], data: Folder, tmp_path: Path) -> None:
    """The mean NLL over the learned tokens of the first batch, as transformers' own loss gives it with labels."""
    kept = Checkpoints(tmp_path)
    Finetuning(job(steps=1, evaluations=1), 0, 1, kept).run()
    rows = data.read_table("train.parquet")
    model = AutoModelForCausalLM.from_pretrained(job().base)
    total, count = 0.0, 0
    for place in batch_places(0, 8, len(rows), 0):
        ids, learn = (torch.tensor([rows[name][place].as_py()]) for name in ("input_ids", "learn_mask"))
        labels = ids.masked_fill(~learn, -100)
        total += model(ids, labels=labels).loss.item() * int(learn[:, 1:].sum())
        count += int(learn[:, 1:].sum())
    assert kept.points[1]["train_nll"] == pytest.approx(total / count, abs=1e-5)


def test_going_on_from_a_checkpoint_gives_the_same_curve(job: Callable[..., Job], tmp_path: Path) -> None:
    whole = Checkpoints(tmp_path / "whole")
    Finetuning(job(), 0, 1, whole).run()
    resumed = Checkpoints(tmp_path / "resumed")
    again = Finetuning(job(), 0, 1, resumed)
    again.restore(tmp_path / "whole" / "4")
    again.run()
    assert [point["step"] for point in resumed.points] == [6, 8]
    assert without_time(again.curve) == without_time([{"lr": 1e-2, "seed": 0, **point} for point in whole.points])


def test_divergence_ends_the_arm_and_is_told(job: Callable[..., Job], tmp_path: Path) -> None:
    finetuning = Finetuning(job(), 0, 1, Checkpoints(tmp_path))
    with torch.no_grad():
        finetuning.weights[0].fill_(math.inf)
    finetuning.run()
    assert finetuning.diverged_at == 1
    assert finetuning.curve[-1]["eval_nll"] == math.inf


def test_exact_match_is_what_greedy_decoding_writes(job: Callable[..., Job], data: Folder, tmp_path: Path) -> None:
    """Teacher-forced exact match equals generating greedily and comparing, row by row."""
    finetuning = Finetuning(job(steps=80, evaluations=1), 0, 1, Checkpoints(tmp_path))
    finetuning.run()
    model, rows = finetuning.model.get_base_model(), Rows(data.read_table("train.parquet"))
    hits = []
    for ids, learn in zip(rows.ids, rows.learn, strict=True):
        prompt = ids[: learn.index(True)]
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=sum(learn), do_sample=False, eos_token_id=2, pad_token_id=0
        )[0].tolist()
        hits.append(written == ids)
    metrics = as_metrics(evaluate(model, rows, range(len(rows))))
    assert metrics["eval_exact_match"] == pytest.approx(sum(hits) / len(hits))
    assert sum(hits) > 0


@pytest.mark.usefixtures("ray_session")
def test_two_workers_give_the_curve_of_one(job: Callable[..., Job], tmp_path: Path) -> None:
    storage = Folder.at(tmp_path)
    one = fit(job("one"), storage)
    two = fit(job("two", workers=2, cpus_per_worker=0.5), storage)
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] <= b["tokens"] + 512  # each worker pads its own share
        assert a["eval_nll"] == pytest.approx(b["eval_nll"], abs=2e-3)
    assert storage.exists(f"{two['checkpoint']}/adapter_model.safetensors")


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_nothing(job: Callable[..., Job], tmp_path: Path) -> None:
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
