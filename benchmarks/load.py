"""Is memory bounded where pool and data are large, and do runs that share a store lose a score or make one twice?

    python -m benchmarks.load [--quick]

Three loads on the real stages, on a tiny base, each in processes of its own:
    catalogue   the index of 10,000 adapters, beside one of 1,000
    rows        the samples stage, which draws 128 of 100,000 rows offered, beside one of 10,000
    runs        8 searches at once, each a process, on one Ray cluster and one `search.store`, with pools that overlap; each pool
                is searched by two of them. Engine: transformers
The last line is a JSON object; the first two are measured as
    ..._seconds                      wall-clock of the stage, Ray's start apart
    ..._driver_mb, ..._worker_mb     the most memory of the driver, and what the largest worker holds apart from shared memory
    ..._driver_growth, ..._worker_growth   the same over that of the smaller load
and the third as
    runs_failed, lost, repeated      runs that did not end well; scores that a leaderboard stands on and that the run's own scores
                                     or the store lack; scores that a run has more than once
    unequal_runs, largest_difference runs whose leaderboard is not that of their twin; between two values of one score, in nats
    scores, doubled                  different scores in the store; how many were made once more, by a run that did not know yet
Any lost or repeated score, failed or unequal run makes the exit code 1.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
import yaml

from benchmarks.memory import Peaks, own_peak
from benchmarks.pools import byte_tokenizer, random_adapters, tiny_base
from pipeline.adapters.index import index
from pipeline.config import load_config
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.data.sample import samples
from pipeline.run_folder import Run
from pipeline.search.search import search

SAME = 1e-4
"""Nats by which two values of one score may differ: the rows of a batch are padded to its longest."""


def main(quick: Annotated[bool, typer.Option(help="A tenth of the adapters and rows, and half the runs.")] = False) -> None:
    """Measure the three loads; the last line is a JSON object."""
    part = 10 if quick else 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = load_base(folder / "base")
        found: dict[str, Any] = _catalogue(folder / "index", base, [1_000 // part, 10_000 // part])
        typer.echo(f"so far: {found}", err=True)
        found |= _rows(folder / "samples", base, [10_000 // part, 100_000 // part])
        typer.echo(f"so far: {found}", err=True)
        runs = 4 if quick else 8
        ray.init(address="local", num_cpus=runs + 2, log_to_driver=False, logging_level="ERROR")
        address = ray.get_runtime_context().gcs_address
        found |= search_at_once(folder / "runs", base, address, runs, adapters=24 if quick else 96, samples=32)
        ray.shutdown()
    print(json.dumps(found))
    if any(found[name] for name in ("runs_failed", "lost", "repeated", "unequal_runs")):
        raise typer.Exit(1)


def load_base(folder: Path) -> str:
    """The tiny base with a tokenizer."""
    byte_tokenizer().save_pretrained(folder)
    return tiny_base(folder)


def _catalogue(folder: Path, base: str, counts: list[int]) -> dict[str, float]:
    places = []
    for count in counts:
        place = folder / str(count)
        random_adapters(place / "pool", base, count, rank=2)
        places.append(write_config(place, base, {"pool": str(place / "pool")}))
    return _grown("index", *(measured_apart("index", place) for place in places))


def _rows(folder: Path, base: str, counts: list[int]) -> dict[str, float]:
    places = []
    for count in counts:
        place = folder / str(count)
        place.mkdir(parents=True)
        write_rows(place / "train.jsonl", count)
        places.append(write_config(place, base, {"search": {"samples": 128}}))
    return _grown("samples", *(measured_apart("samples", place) for place in places))


def write_rows(file: Path, count: int) -> None:
    """Write rows of prompt and completion."""
    with file.open("w") as lines:
        for n in range(count):
            other = n * 7919 % 10007
            lines.write(json.dumps({"prompt": f"What are {n} and {other}? ", "completion": str(n + other)}) + "\n")


def write_config(place: Path, base: str, changes: dict[str, Any]) -> Path:
    """Write the config of a run in the folder `place`, beside its data."""
    content = {
        "run": str(place / "run"),
        "base": base,
        "pool": str(place / "pool"),
        "target": {"train": str(place / "train.jsonl")},
    }
    file = place / "config.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return file


def measured_apart(stage: str, config: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-c", f"from benchmarks.load import measure; measure({stage!r}, {str(config)!r})"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(stage: str, config: str) -> None:
    """Run one stage in this process, and print its seconds and the peaks of memory in megabytes."""
    run = Run(load_config(config))
    run.start_ray()
    started = time.perf_counter()
    with Peaks() as peaks:
        {"index": index, "samples": samples, "search": search}[stage](run)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": round(seconds, 1), "driver_mb": round(own_peak()), "worker_mb": round(peaks.worker)}))


def _grown(stage: str, few: dict[str, float], many: dict[str, float]) -> dict[str, float]:
    ratios = {f"{stage}_{kind}_growth": round(many[f"{kind}_mb"] / max(1, few[f"{kind}_mb"]), 3) for kind in ("driver", "worker")}
    return {f"{stage}_{name}": value for name, value in many.items()} | ratios


def search_at_once(folder: Path, base: str, address: str, runs: int, adapters: int, samples: int) -> dict[str, Any]:
    """Search with several processes at once on the Ray cluster at `address`, and compare what they leave."""
    names = random_adapters(folder / "pool", base, adapters, rank=2)["adapter_id"].to_pylist()
    write_rows(folder / "train.jsonl", 4 * samples)
    kinds = max(1, runs // 2)
    started = time.perf_counter()
    processes = []
    for number in range(runs):
        first = number % kinds * adapters // kinds
        pool = folder / "pool" / f"list-{number % kinds}.txt"
        pool.write_text("\n".join((names + names)[first : first + 2 * adapters // 3]))
        processes.append(_start_search(folder, number, base, pool, samples, address))
    failed = sum(process.wait() != 0 for process in processes)
    found = {"runs": runs, "runs_failed": failed, "runs_seconds": round(time.perf_counter() - started, 1)}
    return found if failed else found | _compare(folder, runs, kinds)


def _start_search(folder: Path, number: int, base: str, pool: Path, samples: int, address: str) -> subprocess.Popen[bytes]:
    place = folder / str(number)
    place.mkdir()
    search = {"samples": samples, "engine": "transformers", "budget": 0.5, "store": str(folder / "store")}
    search |= {"actors": 1, "cpus_per_actor": 0.5}  # so many, and not a node's CPUs each: all are to score at the same time
    config = write_config(place, base, {"pool": str(pool), "target": {"train": str(folder / "train.jsonl")}, "search": search})
    with (place / "log").open("wb") as log:
        command = [sys.executable, "-m", "jobs.search", str(config)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": address})


def _compare(folder: Path, runs: int, kinds: int) -> dict[str, Any]:
    """What stands in the runs' folders and in the store, set against each other."""
    places = [Folder.at(folder / str(number) / "run") for number in range(runs)]
    values: dict[tuple[str, str], list[float]] = {}
    for row in pa.concat_tables([pq.read_table(file) for file in (folder / "store").glob("v*/*.parquet")]).to_pylist():
        values.setdefault((row["adapter_hash"], row["sample_id"]), []).append(row["nll_sum"])
    made = sum(int(run.read_json("stages.json")["search"]["details"]["adapter_samples"]) for run in places)
    checks = [_check(run, values.keys()) for run in places]
    boards = [run.read_table("leaderboard.parquet").to_pylist() for run in places]
    return {
        "lost": sum(lost for lost, _ in checks),
        "repeated": sum(repeated for _, repeated in checks),
        "unequal_runs": sum(not _equal(board, boards[number % kinds]) for number, board in enumerate(boards)),
        "largest_difference": max(max(found) - min(found) for found in values.values()),
        "scores": len(values),
        "doubled": made - len(values),
    }


def _check(run: Folder, stored: Collection[tuple[str, str]]) -> tuple[int, int]:
    """How many scores a run lacks, in its own table or in the store, of those that its leaderboard stands on; and how many it has
    more than once."""
    catalogue, scores = run.read_table("catalogue.parquet"), run.read_table("scores/scores.parquet")
    hashes = dict(zip(catalogue["adapter_id"].to_pylist(), catalogue["adapter_hash"].to_pylist(), strict=True)) | {
        BASE_ID: BASE_ID
    }
    own = Counter(zip(scores["adapter_id"].to_pylist(), scores["sample_id"].to_pylist(), strict=True))
    samples = run.read_table("samples.parquet")["sample_id"].to_pylist()
    board = run.read_table("leaderboard.parquet").to_pylist()
    needed = [(row["adapter_id"], sample) for row in board for sample in samples[: row["stopped_after"]]]
    lost = sum(pair not in own or (hashes[pair[0]], pair[1]) not in stored for pair in needed)
    return lost, own.total() - len(own)


def _equal(board: list[dict[str, Any]], twin: list[dict[str, Any]]) -> bool:
    """Whether two leaderboards have the same adapters at the same places, judged on as many samples, with the same losses."""
    told = [[(row["adapter_id"], row["n_samples"]) for row in rows] for rows in (board, twin)]
    return told[0] == told[1] and all(abs(a["nll"] - b["nll"]) <= SAME for a, b in zip(board, twin, strict=True))


if __name__ == "__main__":
    typer.run(main)
