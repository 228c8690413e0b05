"""How fast and how frugal finetuning is, beside TRL's SFTTrainer and transformers' Trainer.

    python -m benchmarks.training [--quick] [--base FOLDER] [--train FILE.jsonl]

The same model, rows in the same order, batch size, optimizer, schedule and steps, in turns, each in a process of its own with the
same threads and allocator. Without --train, rows of random tokens whose lengths are very uneven (log-normal). Ratios:
    over_trl, over_hf_trainer   seconds a step of theirs / of ours, the median of the turns
    over_trl_defaults           the same, of TRL with the gradient checkpointing that it has on by default
    memory_over_trl             peak memory of our process / of TRL's, model and libraries included
    loss_difference             the largest difference of a step's loss from TRL's, nats a token
    loss_difference_float32     the same of four steps where both compute in float32
    gemm_peak_share             FLOP/s of ours (counted by torch, padding included) / of one large matrix product
    allocator_gain              seconds a step of ours with the C library's allocator / with tcmalloc; null: there is none here
    sharing_gain                seconds a step of ours where each row is computed whole / with what rows begin with computed once
    scaling_2_over_1            tokens/s of two workers under Ray Train / of one, a thread each
"""

import json
import math
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.peak import gemm_peak
from examples.base_model import base_model
from pipeline.cluster.connect import connect
from pipeline.cluster.resources import worker_env, worker_resources
from pipeline.config import TrainConfig
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.data.tokenise import tokenise
from pipeline.model import completion_loss
from pipeline.model.base_model import device, load_tokenizer
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.batches import row_numbers
from pipeline.train.loop import Finetuning
from pipeline.train.ray_train import fit
from pipeline.train.worker_model import Trainable

WARM = 2
"""First steps of a process, which are not counted."""
BATCH_ROWS, RATE, FLOAT32_STEPS = 16, 5e-4, 4
LORA = Lora(8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
PEERS = ("trl", "hf_trainer", "trl_defaults")


def main(
    base: Annotated[str, typer.Option(help="Base model folder; by default SmolLM2-135M-Instruct, made in .cache.")] = "",
    train: Annotated[str, typer.Option(help="JSONL rows; by default random tokens of uneven lengths.")] = "",
    quick: Annotated[bool, typer.Option(help="Fewer steps and turns.")] = False,
) -> None:
    """Measure the ratios and print them as one JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        base = str(Path(base).resolve()) if base else str(base_model())
        data = write_data(Path(scratch), _read(base, train) if train else uneven_rows(base, 400))
        settings = TrainConfig(steps=6 if quick else 12, batch_size=BATCH_ROWS, learning_rates=(RATE,), evaluations=1)
        job = Job(Arm("base", RATE, 0), base, LORA, settings, data, data, "bench")
        found = _side_by_side(job, turns=1 if quick else 3) | _scaling(job, Folder.at(Path(scratch) / "train"))
    print(json.dumps(found))


def uneven_rows(base: str, count: int) -> pa.Table:
    """Rows of random tokens: lengths log-normal with a median of 60, of 8 to 512 tokens, the last fifth of them the answer."""
    draw = np.random.default_rng(0)
    vocabulary = len(load_tokenizer(base))
    lengths = np.clip(draw.lognormal(np.log(60), 0.8, count), 8, 512).astype(int).tolist()
    return pa.Table.from_pylist([_row(draw.integers(3, vocabulary, length).tolist()) for length in lengths], schema=SAMPLES)


def write_data(folder: Path, rows: pa.Table) -> Folder:
    """Training rows, and a validation split that costs next to nothing."""
    data = Folder.at(folder / "data")
    data.write_table("train.parquet", rows)
    data.write_table("validation.parquet", rows.slice(0, 1))
    return data


class Timed(Finetuning):
    """Our loop alone, without Ray, that remembers each step."""

    def __init__(self, job: Job):
        super().__init__(job, 0, 1, lambda metrics, snapshot: None)
        self.losses, self.ends = list[float](), list[float]()

    def _train_step(self, step: dict[str, Any]) -> float | None:
        if (loss := super()._train_step(step)) is not None:
            self.losses.append(loss)
            self.ends.append(time.perf_counter())
        return loss


def ours(job: Job) -> Timed:
    """Our finetuning, done."""
    timed = Timed(job)
    timed.run()
    return timed


def theirs(job: Job, kind: str) -> Trainer:
    """TRL's or transformers' finetuning of our first weights on our rows in our order, done; step ends are in `ends`."""
    clock = _Clock()
    trainer = _trainer(job, kind, clock)
    trainer.train()
    trainer.ends = clock.ends
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """Of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _trainer(job: Job, kind: str, clock: "_Clock") -> Trainer:
    train = job.train
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": train.steps,
        "per_device_train_batch_size": train.batch_size,
        "learning_rate": job.arm.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(train.warmup * train.steps),
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device().type == "cpu",
        "train_sampling_strategy": "sequential",
        "bf16": False,  # the base is in the type that is fast here, for all of us
        "gradient_checkpointing": kind == "trl_defaults",
    }
    model, rows = Trainable(job, 1).model, _in_order(job)
    tokenizer = load_tokenizer(job.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if kind == "hf_trainer":
        collator = DataCollatorForSeq2Seq(tokenizer)
        return Trainer(model, TrainingArguments(**common), collator, Dataset.from_list(_labelled(rows)), callbacks=[clock])
    arguments = SFTConfig(**common, max_length=None, completion_only_loss=True)
    given = [{"input_ids": row["input_ids"], "completion_mask": [int(flag) for flag in row["learn_mask"]]} for row in rows]
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(given), processing_class=tokenizer, callbacks=[clock])


def _in_order(job: Job) -> list[dict[str, Any]]:
    """The rows of all steps, one after the other."""
    rows = job.data.read_table("train.parquet").to_pylist()
    return [rows[row] for row in row_numbers(0, job.train.steps, job.train.batch_size, len(rows), job.arm.seed)]


def _labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": [token if flag else -100 for token, flag in zip(row["input_ids"], row["learn_mask"], strict=True)],
        }
        for row in rows
    ]


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def _read(base: str, file: str) -> pa.Table:
    tokenizer = load_tokenizer(base)
    rows = [tokenise(json.loads(line), tokenizer) for line in Path(file).read_text().splitlines() if line.strip()]
    return pa.Table.from_pylist([{"sample_id": "", "split": "train", **row} for row in rows], schema=SAMPLES)


def _row(ids: list[int]) -> dict[str, Any]:
    learned = max(1, len(ids) // 5)
    mask = [False] * (len(ids) - learned) + [True] * learned
    return {"sample_id": "", "split": "train", "input_ids": ids, "completion_mask": mask, "learn_mask": mask}


def _side_by_side(job: Job, turns: int) -> dict[str, Any]:
    """Every contender in turns; what they took, and how ours compares."""
    connect()
    environment = worker_env(worker_resources("auto", "auto"))["env_vars"]
    plain = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    kinds = ["ours", *PEERS, "ours_whole", *(["ours_plain"] if "LD_PRELOAD" in environment else [])]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        for kind in kinds:
            chosen = plain if kind == "ours_plain" else environment
            found[kind].append(_in_process(kind.removesuffix("_plain"), job, chosen))
            typer.echo(f"turn {turn + 1}, {kind}: {found[kind][-1]['seconds']:.3f} s a step", err=True)
    pairs = {kind: zip(found[kind], found["ours"], strict=True) for kind in kinds[1:]}
    ratio = {kind: statistics.median(a["seconds"] / b["seconds"] for a, b in both) for kind, both in pairs.items()}
    ours, trl = found["ours"][0], found["trl"][0]
    exact = replace(job, train=job.train.model_copy(update={"dtype": "float32", "steps": FLOAT32_STEPS}))
    in_float32 = [_in_process(kind, exact, environment) for kind in ("ours", "trl")]
    seconds = statistics.median(one["seconds"] for one in found["ours"])
    return {
        **{f"over_{kind}": round(ratio[kind], 3) for kind in PEERS},
        "memory_over_trl": round(ours["peak"] / trl["peak"], 3),
        "memory_over_trl_defaults": round(ours["peak"] / found["trl_defaults"][0]["peak"], 3),
        "loss_difference": _loss_difference(ours, trl),
        "loss_difference_float32": _loss_difference(*in_float32),
        "gemm_peak_share": round(statistics.median(one["gemm_share"] for one in found["ours"]), 3),
        "allocator_gain": round(ratio["ours_plain"], 3) if "ours_plain" in ratio else None,
        "sharing_gain": round(ratio["ours_whole"], 3),
        "seconds_a_step": round(seconds, 3),
        "tokens_a_second": round(ours["tokens"] / seconds),
    }


def _loss_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def _in_process(kind: str, job: Job, environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(pickle.dumps(job))
        command = [sys.executable, "-c", f"from benchmarks.training import measure; measure({kind!r}, {file.name!r})"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(kind: str, file: str) -> None:
    """Run one contender in this process and print what it took: median seconds a step, peak memory in bytes, losses, unpadded
    tokens a step and, of ours, the share of the GEMM peak."""
    job: Job = pickle.loads(Path(file).read_bytes())
    mine = kind.startswith("ours")
    if kind == "ours_whole":
        completion_loss.SHARED = sys.maxsize
    done: Any = ours(job) if mine else theirs(job, kind)
    found = {
        "seconds": statistics.median(end - start for start, end in pairwise(done.ends[WARM - 1 :])),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": done.losses if mine else losses(done),
        "tokens": sum(len(row["input_ids"]) for row in _in_order(job)) / job.train.steps,
    }
    if mine:
        found["gemm_share"] = _flops(done) / job.train.steps / found["seconds"] / gemm_peak()
    print(json.dumps(found))


def _flops(done: Timed) -> float:
    """Of all training steps, counted while they are done once more."""
    steps = done.feed(done.share, 0, done.step)
    done.step = 0
    with FlopCounterMode(display=False) as counter:
        for step in steps:
            Finetuning._train_step(done, step)
            done.step += 1
    return float(counter.get_total_flops())


def _scaling(job: Job, storage: Folder) -> dict[str, float]:
    """Under Ray Train, so that starting and streaming are those of a run; the first half of the steps warms up."""
    speeds = []
    for workers in (1, 2):
        settings = job.train.model_copy(update={"workers": workers, "cpus_per_worker": 0.9, "evaluations": 2})
        curve = fit(replace(job, train=settings, key=f"workers{workers}"), storage)["curve"]
        speeds.append((curve[2]["tokens"] - curve[1]["tokens"]) / (curve[2]["seconds"] - curve[1]["seconds"]))
    return {"scaling_2_over_1": round(speeds[1] / speeds[0], 3)}


if __name__ == "__main__":
    typer.run(main)
