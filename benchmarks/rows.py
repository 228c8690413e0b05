"""Does memory stay where it is as a target grows, and does training wait for its rows?

    python -m benchmarks.rows [--rows 10000000] [--quick]

The samples stage and 50 training steps under Ray Train on a tiny base, with 100,000 short rows of a JSONL file (a byte a token,
some 30 in a row) and with `--rows`, each in processes of their own. The last line is a JSON object:
    driver_mb, object_store_mb, worker_mb, trainer_mb    the most memory of the driver; of Ray's object store; of the largest of
                         the workers that read, tokenise, draw and write; of the training worker. Of workers what they hold
                         apart from shared memory and mapped files, looked at ten times a second
    ..._growth           the same over that with 100,000 rows; of the object store, which holds next to nothing, its size tells
    wait_share           seconds in which steps waited for their rows / seconds of all steps
    samples_seconds      wall-clock of the samples stage
    start_seconds        of the training worker: the base, and the rows of all steps, which are brought to its disk meanwhile
    step_ms              wall-clock of a step
--quick: 10,000 rows and 100,000. The goals are a growth of 1.2 and a share of 0.02.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.load import load_base
from benchmarks.memory import Peaks, own_peak
from benchmarks.pools import TARGETS
from pipeline.config import Config, SearchConfig, TargetConfig, TrainConfig
from pipeline.data.sample import samples
from pipeline.run_folder import Run
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.ray_train import fit

STEPS, BATCH_ROWS = 50, 32
KINDS = ("driver", "worker", "trainer")


def main(
    rows: Annotated[int, typer.Option(help="Of the large target.")] = 10_000_000,
    quick: Annotated[bool, typer.Option(help="10,000 rows and 100,000.")] = False,
) -> None:
    """Measure both targets; the last line is a JSON object."""
    few, many = (10_000, 100_000) if quick else (100_000, rows)
    with tempfile.TemporaryDirectory() as scratch:
        base = load_base(Path(scratch) / "base")
        found = {count: _measured(Path(scratch) / str(count), base, count) for count in (few, many)}
    growth = {f"{kind}_growth": round(found[many][f"{kind}_mb"] / found[few][f"{kind}_mb"], 3) for kind in KINDS}
    print(json.dumps({"rows": many, **found[many], **growth, f"with_{few}": found[few]}))


def write_rows(file: Path, count: int) -> None:
    """As many different rows, a line each."""
    file.parent.mkdir(parents=True)
    with file.open("w") as lines:
        lines.writelines(f'{{"prompt": "What are {n} and {n % 7}? ", "completion": "{n + n % 7}"}}\n' for n in range(count))


def _measured(folder: Path, base: str, count: int) -> dict[str, float]:
    write_rows(folder / "train.jsonl", count)
    command = [sys.executable, "-c", f"from benchmarks.rows import measure; measure({str(folder)!r}, {base!r})"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    typer.echo(f"{count} rows: {found}", err=True)
    return found


def measure(folder: str, base: str) -> None:
    """Draw the samples of the target in a folder, train, and print the times and the peaks of memory in megabytes."""
    target, search = TargetConfig(train=f"{folder}/train.jsonl"), SearchConfig(samples=128)
    run = Run(Config(run=f"{folder}/run", base=base, pool=f"{folder}/pool", target=target, search=search))
    run.start_ray()
    settings = TrainConfig(steps=STEPS, batch_size=BATCH_ROWS, evaluations=1)
    data = run.folder.sub("data")
    job = Job(Arm("base", 1e-4, 0), base, Lora(8, 16.0, TARGETS), settings, data, data, "bench")
    started = time.perf_counter()
    with Peaks() as drawing:
        samples(run)
    seconds = time.perf_counter() - started
    with Peaks() as training:
        outcome = fit(job, run.folder.sub("train"))
    trained = outcome["curve"][-1]["seconds"]
    found = {
        "driver_mb": own_peak(),
        "object_store_mb": max(drawing.object_store, training.object_store),
        "worker_mb": drawing.worker,
        "trainer_mb": training.worker,
        "samples_seconds": seconds,
        "start_seconds": outcome["startup_seconds"],
        "step_ms": 1000 * trained / STEPS,
    }
    print(
        json.dumps(
            {**{name: round(value, 1) for name, value in found.items()}, "wait_share": outcome["waiting_seconds"] / trained}
        )
    )


if __name__ == "__main__":
    typer.run(main)
