"""One stage of the GPU check in a process of its own, so that the next one finds the device empty.

`python -m benchmarks.gpu` starts it.
"""

import gc
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from benchmarks.gpu.checks import FAILED, SKIPPED, Check, Record, Results, Setting, run_checks

MODULES = {
    "A": ("benchmarks.gpu.exact", "benchmarks.gpu.speed"),
    "B": ("benchmarks.gpu.whole_run",),
    "C": ("benchmarks.gpu.engine",),
}
AGAIN = 75
"""Exit code: the device does not work any more in this process, and checks are left."""


def main(stage: str, device: str, out: Path, scratch: Path, end: float) -> None:
    """Run what has no record of a stage yet; `end` is as `time.time()` gives it."""
    results = Results(out)
    if device == "cuda" and not torch.cuda.is_available():
        results.end(
            Record(stage, "device", FAILED, why="torch finds no CUDA device; --device cpu tries the checks at tiny sizes")
        )
        return
    if device == "cuda":
        results.tell(gpu=torch.cuda.get_device_name(), memory_gb=round(torch.cuda.mem_get_info()[1] / 1e9, 1))
    started = time.perf_counter()
    try:
        checks = _checks(stage)
    except ImportError as error:
        why = f"it cannot be imported: {error}"
        results.end(Record(stage, "all", SKIPPED, round(time.perf_counter() - started, 2), why=why))
        return
    if not run_checks(stage, checks, Setting(device, scratch), results, end, _usable):
        sys.exit(AGAIN)


def _checks(stage: str) -> Sequence[Check]:
    if stage == "B":
        from pipeline.core.progress import quiet_libraries  # needs rich

        quiet_libraries()
    return [check for name in MODULES[stage] for check in importlib.import_module(name).CHECKS]


def _usable() -> bool:
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
