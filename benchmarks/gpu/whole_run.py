"""Stage B, with Ray: a whole run on a tiny base, and what a compute task leaves in the device's memory."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.gpu.checks import Check, Setting, SkippedError, WrongError
from benchmarks.gpu.models import LINEAR, TINY, make_model
from benchmarks.pools import byte_tokenizer, random_adapters
from pipeline.cluster.connect import connect
from pipeline.cluster.resources import compute_task
from pipeline.config import TrainConfig, build_config
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.data.tokenise import tokenise
from pipeline.model.base_model import load_tokenizer
from pipeline.run import run_all
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.loop import Finetuning

WORDS = ("fox", "dog", "river", "hotel", "review", "France", "Paris", "number")
HELD_GB = 4.0
"""That the task takes."""
LEFT_GB = 0.25
"""That may be there after it has ended; a CUDA context alone takes more."""
PATIENCE = 20.0
"""Seconds that Ray has to end the task's process."""
USED = "import torch; free, total = torch.cuda.mem_get_info(); print(total - free)"


def whole_run(setting: Setting) -> dict[str, Any]:
    """`mashup run` with the transformers engine: two donors that were trained on the target's kind of task and two random ones.
    Seconds are those of the stages before training, as the summary has them."""
    folder = setting.scratch / "run"
    rows = [{"prompt": f"{a} and {b}", "completion": b} for a in WORDS for b in WORDS]
    base = str(setting.scratch / "base")
    byte_tokenizer().save_pretrained(base)
    make_model(TINY, torch.float32, "cpu").save_pretrained(base)
    random_adapters(setting.scratch / "pool", base, 2, 4, LINEAR)
    for seed in (1, 2):
        _train_donor(setting.scratch, base, rows, seed)
    (setting.scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run": str(folder),
        "base": base,
        "pool": str(setting.scratch / "pool"),
        "target": {"train": str(setting.scratch / "rows.jsonl")},
        "search": {"samples": 24, "engine": "transformers", "actors": 1},
        "merge": {"rank": 8},
        "train": {"steps": 6, "batch_size": 8, "learning_rates": [5e-3], "evaluations": 3},
    }
    summary = run_all(build_config(content, "the GPU check"))
    curves = pq.read_table(folder / "comparison.parquet").to_pylist()
    wrong = [row for row in curves if not math.isfinite(row["eval_nll"])]
    missing = [name for name in ("report.html", "finetuned/adapter_model.safetensors") if not (folder / name).is_file()]
    if wrong or missing or {row["init"] for row in curves} != set(summary["inits"]):
        raise WrongError(f"missing: {missing}; evaluations without a finite loss: {wrong}; inits: {list(summary['inits'])}")
    seconds = {f"{name}_s": round(float(value), 1) for name, value in summary["overhead_seconds"].items()}
    last = {f"{row['init']}_nll": row["eval_nll"] for row in curves}  # the last row of each wins
    return {"verdict": summary["verdict"], "recipe": summary["recipe"], **last, **seconds}


def memory_after_a_task(setting: Setting) -> dict[str, Any]:
    """What the device holds, seen from another process, after a compute task has ended: no more than before it. An engine that
    starts next wants nine tenths of the device."""
    if setting.tiny:
        raise SkippedError("a CPU gives memory back when it is freed")
    connect()
    before = device_memory()
    during = ray.get(compute_task(_hold).remote(int(HELD_GB * 1e9)))
    left = left_behind(before, device_memory, PATIENCE)
    figures = {"before_gb": before / 1e9, "during_gb": during / 1e9, "left_gb": left / 1e9}
    if during - before < HELD_GB * 1e9:
        raise WrongError(f"the task took less than {HELD_GB} GB of the device", figures)
    if left > LEFT_GB * 1e9:
        raise WrongError(f"{left / 1e9:.2f} GB are left {PATIENCE:.0f} s after the task has ended", figures)
    return figures


def left_behind(before: int, memory: Callable[[], int], patience: float) -> int:
    """Bytes that `memory` gives beyond `before`, once they are as good as none or patience is at an end."""
    end = time.monotonic() + patience
    while (left := memory() - before) > LEFT_GB * 1e9 and time.monotonic() < end:
        time.sleep(0.5)
    return left


def device_memory() -> int:
    """Bytes of the device that are taken, by a process of its own, whose context is among them each time."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    found = subprocess.run([sys.executable, "-c", USED], env=environment, capture_output=True, text=True, check=True)
    return int(found.stdout)


def _hold(size: int) -> int:
    """In a task: take memory and let it go, as a model does at the end of a function. Gives what the device then holds."""
    held = torch.empty(size, dtype=torch.uint8, device="cuda")
    del held
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _train_donor(scratch: Path, base: str, rows: list[dict[str, str]], seed: int) -> None:
    """An adapter that was trained on the rows for a few steps."""
    tokens = [{"sample_id": str(n), "split": "train", **tokenise(row, load_tokenizer(base))} for n, row in enumerate(rows)]
    data = Folder.at(scratch / "donor-rows")
    for split in ("train", "validation"):
        data.write_table(f"{split}.parquet", pa.Table.from_pylist(tokens, schema=SAMPLES))
    settings = TrainConfig(steps=15 * seed, batch_size=16, evaluations=1)
    job = Job(Arm("base", 1e-2, seed), base, Lora(4, 8.0, LINEAR), settings, data, data, "donor")

    def keep(metrics: dict[str, Any], snapshot: Callable[[], Callable[[Path], None] | None]) -> None:
        if metrics["step"] == settings.steps and (write := snapshot()):
            folder = scratch / f"pool/trained-{seed}"
            folder.mkdir(parents=True)
            write(folder)

    Finetuning(job, 0, 1, keep).run()


CHECKS: tuple[Check, ...] = (memory_after_a_task, whole_run)
