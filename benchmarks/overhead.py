"""What Ray and our own code cost on top of the bare engine and the bare training loop.

    python -m benchmarks.overhead [--quick] [--base FOLDER] [--engine vllm]

Ratios, each of two things measured in this one run:
    search_over_engine        seconds a batch of adapters of the Ray Data search / of the bare engine in a process of its own
    train_over_bare           seconds of the training steps under Ray Train / of the same loop without Ray
    driver_memory_growth, engine_..., dispatcher_...
                              peak memory of a process in a search of 10,000 adapters / of 100
Start-up is left out of the first two and printed apart. The bare halves run before and after, so that a machine which grows
slower or faster favours neither.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import ray
import typer

from benchmarks.pools import TARGETS, VOCABULARY, everything, random_adapters, random_samples, tiny_base
from pipeline.adapters.catalogue import build_catalogue
from pipeline.cluster.connect import connect
from pipeline.cluster.resources import worker_env, worker_resources
from pipeline.config import SearchConfig, TrainConfig
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.engines.scorer import Candidate, EngineConfig, build_scorer
from pipeline.model.base_model import linear_shapes
from pipeline.search.engine_pool import engine_config, score_stream
from pipeline.search.race import make_schedule
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.loop import Finetuning
from pipeline.train.ray_train import fit

RANK = 8
PER_BATCH = 4


def main(
    base: Annotated[str, typer.Option(help="Base model folder; by default a tiny random one.")] = "",
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    quick: Annotated[bool, typer.Option(help="Fewer batches and steps.")] = False,
) -> None:
    """Measure the ratios and print them as one JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Workers run in other folders than this command.
        base = str(Path(base).resolve()) if base else tiny_base(folder / "base")
        found: dict[str, Any] = _memory_growth(100, 1_000 if quick else 10_000)
        typer.echo(f"so far: {found}", err=True)
        connect()
        parts = (
            lambda: _search(folder, base, engine, batches=4 if quick else 12),
            lambda: _train(folder, base, steps=10 if quick else 40),
        )
        for measure in parts:
            found |= measure()
            typer.echo(f"so far: {found}", err=True)
    print(json.dumps(found))


def _search(folder: Path, base: str, engine: str, batches: int) -> dict[str, Any]:
    adapters = random_adapters(folder / "pool", base, PER_BATCH * batches, RANK)
    samples = random_samples(16, 64, _vocabulary(base))
    search = SearchConfig(engine=engine, adapters_per_batch=PER_BATCH, actors=1)
    config = engine_config(base, RANK, TARGETS, search, max_tokens=128)
    resources = worker_resources(search.cpus_per_actor, search.gpus_per_actor)
    bare_task = ray.remote(_bare_search).options(num_cpus=resources.cpus, runtime_env=worker_env(resources))
    half = PER_BATCH * (batches // 2)
    bare = ray.get(bare_task.remote(engine, config, adapters.slice(0, half), samples))
    scores = folder / "scores"
    started = time.perf_counter()
    work = everything(adapters, samples, scores)
    *_, last = score_stream(work, config, search, make_schedule(len(work.candidates), len(samples), 0, share=1))
    wall = time.perf_counter() - started
    bare += ray.get(bare_task.remote(engine, config, adapters.slice(half), samples))
    ends = sorted(file.stat().st_mtime for file in scores.rglob("*.parquet"))
    # From the end of the first batch to the end of the last: neither start-up nor the base is in it.
    streamed = statistics.median(end - start for start, end in pairwise(ends[1:]))
    return {
        "search_over_engine": round(streamed / statistics.median(bare), 3),
        "engine_start_seconds": round(last.startup, 1),
        "search_wall_seconds": round(wall, 1),
        "seconds_a_batch": round(streamed, 3),
    }


def _bare_search(engine: str, config: EngineConfig, adapters: pa.Table, samples: pa.Table) -> list[float]:
    """Seconds of each batch with the engine alone. A Ray task only for a process with the same environment."""
    scorer = build_scorer(engine, config)
    scorer.score([Candidate(BASE_ID, None)], samples)  # the first batch of a process is slow
    seconds: list[float] = []
    for batch in adapters.to_batches(max_chunksize=PER_BATCH):
        started = time.perf_counter()
        scorer.score([Candidate(row["adapter_id"], Path(row["uri"])) for row in batch.to_pylist()], samples)
        seconds.append(time.perf_counter() - started)
    return seconds


def _train(folder: Path, base: str, steps: int) -> dict[str, Any]:
    data = Folder.at(folder / "data")
    for split, count in (("train", 64), ("validation", 8)):
        data.write_table(f"{split}.parquet", random_samples(count, 64, _vocabulary(base)))
    settings = TrainConfig(steps=steps, batch_size=8, evaluations=1)
    job = Job(Arm("base", 1e-4, 0), base, Lora(RANK, 16.0, TARGETS), settings, data, data, "bench")
    half = replace(job, train=settings.model_copy(update={"steps": steps // 2}))
    resources = worker_resources(settings.cpus_per_worker, settings.gpus_per_worker)
    bare_task = ray.remote(_bare_train).options(num_cpus=resources.cpus, runtime_env=worker_env(resources))
    bare = ray.get(bare_task.remote(half))
    started = time.perf_counter()
    outcome = fit(job, Folder.at(folder / "train"))
    wall = time.perf_counter() - started
    bare += ray.get(bare_task.remote(half))
    under_ray = outcome["curve"][-1]["seconds"]
    return {
        "train_over_bare": round(under_ray / bare, 3),
        "train_wall_seconds": round(wall, 1),
        "train_start_seconds": round(outcome["startup_seconds"], 1),
        "seconds_a_step": round(under_ray / steps, 3),
    }


def _bare_train(job: Job) -> float:
    finetuning = Finetuning(job, 0, 1, lambda metrics, snapshot: None)
    finetuning.run()
    return finetuning.seconds


def _memory_growth(few: int, many: int) -> dict[str, float]:
    """Peak memory of each kind of process at `many` adapters over that at `few`; each search in a driver of its own."""
    peaks = []
    for count in (few, many):
        command = [sys.executable, "-c", f"from benchmarks.overhead import print_peaks; print_peaks({count})"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {f"{name}_memory_growth": round(peaks[1][name] / peaks[0][name], 3) for name in peaks[0]}


def print_peaks(count: int) -> None:
    """Index `count` adapters of a tiny base, search them within a tenth of the exhaustive cost, and print the peak memory of the
    driver, of the engine's process and of the dispatcher's, in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = tiny_base(folder / "base")
        random_adapters(folder / "pool", base, count, rank=2)
        connect()
        adapters = build_catalogue(base, str(folder / "pool"))
        samples = random_samples(32, 16, VOCABULARY)
        search = SearchConfig(engine="transformers", adapters_per_batch=8, actors=1)
        work = everything(adapters, samples, folder / "scores")
        peaks = {"engine": 0, "dispatcher": 0}
        for _ in score_stream(
            work, engine_config(base, 2, TARGETS, search, max_tokens=32), search, make_schedule(count + 1, 24, 8, share=0.1)
        ):
            for name, title in (("engine", "MapWorker"), ("dispatcher", "Dispatcher")):
                peaks[name] = max(peaks[name], _memory_of(title))
    print(json.dumps({"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **peaks}))


def _memory_of(title: str) -> int:
    """Bytes held by this process' descendants of that title, the largest."""
    found = [0]
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process.memory_info().rss)
    return max(found)


def _vocabulary(base: str) -> int:
    from transformers import AutoConfig

    linear_shapes(base)  # an unknown base gives a clear error
    return int(AutoConfig.from_pretrained(base).vocab_size)


if __name__ == "__main__":
    typer.run(main)
