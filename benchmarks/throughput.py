"""Tokens a second of this search's engine on a CPU, beside what one would use instead, in one run.

    python -m benchmarks.throughput [--quick] [--base FOLDER] [--pool FOLDER]

For batches of 1 to 16 adapters of rank 4 to 64 on all linear layers (or those of --pool), engines score the same rows, each in a
process of its own with the environment of the search's workers:
    ours               vLLM with our plugin
    ours, base         the same engine, the base alone as often as there are adapters
    vLLM base          vLLM as it comes, without LoRA: the base as often as there are adapters
    vLLM LoRA          vLLM as it comes, with the same adapters
    PEFT, reloaded     transformers and PEFT, one adapter after the other, base reloaded for each: what the paper's code does
    PEFT, mixed        transformers and PEFT, all adapters loaded, mixed in one batch by `adapter_names`
Tokens/s are all tokens of the rows / seconds of a pass over adapters that are loaded already (PEFT, reloaded loads in each).
Adapters/min are of a first pass, the loading in it. The slow engines get fewer rows or adapters, and are scaled to the same rows.

The last line is one JSON object, each figure the worst of the measured batches:
    lora_over_base          tokens/s of ours / of vLLM base: the two alternate, median of the rounds' ratios
    over_stock_vllm_lora    tokens/s of ours / of vLLM LoRA
    over_peft_per_adapter   adapters/min of ours / of PEFT, reloaded
    gemm_peak_share         FLOP/s of ours / of one large matrix product in the same dtype. Counted are 2 x parameters of the
                            linear layers x tokens and 2 x parameters of the head x completion tokens; not LoRA and attention
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
import torch
import typer
from peft import PeftModel
from transformers import AutoConfig

from benchmarks.peak import gemm_peak
from benchmarks.pools import random_adapters, random_samples
from examples.base_model import base_model
from pipeline.adapters.adapter import read_adapter
from pipeline.cluster.connect import connect
from pipeline.cluster.resources import Resources, worker_env
from pipeline.core.errors import AdapterError
from pipeline.engines.scorer import Candidate, EngineConfig, build_scorer
from pipeline.model.base_model import fast_dtype, linear_shapes, load_model

LENGTH, COMPLETION = 80, 16
"""Tokens of a row, and how many of them are the completion."""
ROWS, QUICK_ROWS, SLOW_ROWS = 4, 2, 1
"""Rows that an adapter is scored on; the last for vLLM's own LoRA and PEFT's mixed batch."""
SLOW_ADAPTERS = 4
"""Adapters of PEFT, reloaded, at most."""
ROUNDS, SLOW_PASSES = 3, 2
COUNTS, RANKS = (1, 4, 16), (4, 16, 64)
QUICK = [(1, 4), (4, 16), (16, 64)]
"""(adapters in a batch, rank)."""
MIXED_ROWS = 24
"""Rows in a batch of PEFT's."""

NUMBERS = itertools.count()


class Engine:
    """Any scorer, timed. An actor, for a process of its own."""

    def __init__(self, kind: str, config: EngineConfig):
        ours: dict[str, Any] = {"reloaded": Reloaded, "mixed": Mixed}
        self.scorer = ours[kind](config) if kind in ours else build_scorer(kind, config)

    def seconds(self, candidates: Sequence[Candidate], samples: pa.Table) -> float:
        started = time.perf_counter()
        self.scorer.score(candidates, samples)
        return time.perf_counter() - started

    def gemm_peak(self) -> float:
        return gemm_peak()


class Reloaded:
    """One adapter after the other, the base loaded anew for each."""

    def __init__(self, config: EngineConfig):
        self.config = config

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> None:
        for candidate in candidates:
            build_scorer("transformers", self.config).score([candidate], samples)


class Mixed:
    """Several adapters in a batch by PEFT's `adapter_names`; for rows of one length whose completions are, too."""

    def __init__(self, config: EngineConfig):
        self.base = load_model(config.base, fast_dtype(config.dtype))
        self.model: Any = None

    @torch.inference_mode()
    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> None:
        for candidate in candidates:
            self._load(candidate.adapter_id, str(candidate.folder))
        ids_BT = torch.tensor(samples["input_ids"].to_pylist()).repeat(len(candidates), 1)
        names = [candidate.adapter_id for candidate in candidates for _ in range(len(samples))]
        for first in range(0, len(names), MIXED_ROWS):
            part_BT = ids_BT[first : first + MIXED_ROWS]
            kept = COMPLETION + 1
            logits = self.model(part_BT, adapter_names=names[first : first + MIXED_ROWS], logits_to_keep=kept).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part_BT[:, -COMPLETION:].flatten(), reduction="none")

    def _load(self, name: str, folder: str) -> None:
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name).eval()
        elif name not in self.model.peft_config:
            self.model.load_adapter(folder, adapter_name=name)


@dataclass(frozen=True)
class Speed:
    tokens_s: float
    adapters_min: float


@dataclass(frozen=True)
class Batch:
    """What the engines are compared on: adapters of at most `rank`, each scored on all samples."""

    base: str
    folders: list[Path]
    rank: int
    targets: tuple[str, ...]
    samples: pa.Table

    def candidates(self, count: int) -> list[Candidate]:
        """Adapters under names that no engine has seen."""
        return [Candidate(f"adapter-{next(NUMBERS)}", folder) for folder in self.folders[:count]]

    def config(self, max_rank: int) -> EngineConfig:
        return EngineConfig(self.base, "auto", max_rank, self.targets, LENGTH, max(1, len(self.folders)))

    def speed(self, count: int, rows: int, first: float, again: float) -> Speed:
        """From the seconds of a first pass of `count` adapters over `rows` rows, and of the same again."""
        tokens_s = count * rows * LENGTH / again
        loading = max(0.0, first - again) / count
        return Speed(tokens_s, 60 / (loading + len(self.samples) * LENGTH / tokens_s))


def main(
    base: Annotated[str, typer.Option(help="Base model folder; by default SmolLM2-135M-Instruct, made in .cache.")] = "",
    pool: Annotated[Path | None, typer.Option(help="Folder of adapters; by default random ones on all linear layers.")] = None,
    quick: Annotated[bool, typer.Option(help="Three batches and fewer rows; within ten minutes on two cores.")] = False,
) -> None:
    """Measure the engines side by side; a table, then one JSON object."""
    place = str(Path(base).resolve() if base else base_model())
    with tempfile.TemporaryDirectory() as scratch:
        connect()
        measured = list(_measure(_batches(place, pool, Path(scratch), quick)))
    print(json.dumps({name: round(min(found[name] for found in measured), 3) for name in measured[0]}))


def _batches(base: str, pool: Path | None, scratch: Path, quick: bool) -> Iterator[Batch]:
    samples = random_samples(QUICK_ROWS if quick else ROWS, LENGTH, AutoConfig.from_pretrained(base).vocab_size, COMPLETION)
    if pool is not None:
        folders, rank, targets = _read_pool(pool)
        counts = [(count, rank) for count in COUNTS]
    else:
        shapes, head = linear_shapes(base)
        targets = tuple(sorted({name.rpartition(".")[2] for name in shapes if name != head}))
        counts = QUICK if quick else list(itertools.product(COUNTS, RANKS))
    for count, rank in counts:
        if pool is None:
            made = random_adapters(scratch / f"rank-{rank}", base, count, rank, targets)
            folders = [Path(uri) for uri in made["uri"].to_pylist()]
        yield Batch(base, list(itertools.islice(itertools.cycle(folders), count)), rank, targets, samples)


def _read_pool(pool: Path) -> tuple[list[Path], int, tuple[str, ...]]:
    """Folders of the adapters that can be read, their largest rank and all their target modules."""
    adapters = {}
    for folder in sorted(pool.resolve().iterdir()):
        try:
            adapters[folder] = read_adapter(folder)
        except AdapterError as error:
            typer.echo(f"left out: {folder.name}: {error}", err=True)
    targets = {leaf for adapter in adapters.values() for leaf in adapter.target_leaves}
    return list(adapters), max(adapter.max_rank for adapter in adapters.values()), tuple(sorted(targets))


def _measure(batches: Iterator[Batch]) -> Iterator[dict[str, float]]:
    """The figures of each batch; prints its rows of the table."""
    stock, peak = None, 0.0
    for batch in batches:
        if stock is None:
            stock = _start("vllm", batch.config(max_rank=0), plugins=False)
            peak = ray.get(stock.gemm_peak.remote())
            print(f"GEMM peak: {peak / 1e9:.0f} GFLOP/s in {fast_dtype('auto')}\n")
            print(
                "| adapters | rank | engine | tokens/s | adapters/min | GEMM peak share |\n| --- | --- | --- | --- | --- | --- |"
            )
        speeds, over_base = _fast_engines(batch, stock)
        speeds |= _slow_engines(batch)
        shares = {name: _flops(batch) * speed.tokens_s / peak for name, speed in speeds.items()}
        for name, speed in speeds.items():
            figures = f"{speed.tokens_s:.0f} | {speed.adapters_min:.1f} | {shares[name]:.2f}"
            print(f"| {len(batch.folders)} | {batch.rank} | {name} | {figures} |", flush=True)
        ours = speeds["ours"]
        yield {
            "lora_over_base": over_base,
            "over_stock_vllm_lora": ours.tokens_s / speeds["vLLM LoRA"].tokens_s,
            "over_peft_per_adapter": ours.adapters_min / speeds["PEFT, reloaded"].adapters_min,
            "gemm_peak_share": shares["ours"],
        }


def _fast_engines(batch: Batch, stock: Any) -> tuple[dict[str, Speed], float]:
    """Ours and vLLM's base, turn by turn: speeds, and the median ratio of ours over vLLM's base."""
    engine, count, rows = _start("vllm", batch.config(batch.rank)), len(batch.folders), len(batch.samples)
    nobody, adapters = [Candidate("base", None)] * count, batch.candidates(count)
    for warm in (stock, engine):
        ray.get(warm.seconds.remote(nobody, batch.samples.slice(0, SLOW_ROWS)))
    first = ray.get(engine.seconds.remote(adapters, batch.samples))
    turns = {"ours": (engine, adapters), "ours, base": (engine, nobody), "vLLM base": (stock, nobody)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(ROUNDS):
        for name, (actor, candidates) in turns.items():
            seconds[name].append(ray.get(actor.seconds.remote(candidates, batch.samples)))
    ray.kill(engine)
    _tell(batch, seconds)
    typical = {name: statistics.median(values) for name, values in seconds.items()}
    speeds = {name: batch.speed(count, rows, first if name == "ours" else again, again) for name, again in typical.items()}
    return speeds, statistics.median(b / o for o, b in zip(seconds["ours"], seconds["vLLM base"], strict=True))


def _slow_engines(batch: Batch) -> dict[str, Speed]:
    kinds = {
        "vLLM LoRA": ("vllm", len(batch.folders), SLOW_ROWS),
        "PEFT, reloaded": ("reloaded", min(SLOW_ADAPTERS, len(batch.folders)), len(batch.samples)),
        "PEFT, mixed": ("mixed", len(batch.folders), SLOW_ROWS),
    }
    speeds = {}
    for name, (kind, count, rows) in kinds.items():
        engine = _start(kind, batch.config(batch.rank), plugins=False)
        part, adapters = batch.samples.slice(0, rows), batch.candidates(count)
        seconds = [ray.get(engine.seconds.remote(adapters, part)) for _ in range(SLOW_PASSES)]
        ray.kill(engine)
        _tell(batch, {name: seconds})
        speeds[name] = batch.speed(count, rows, seconds[0], min(seconds[1:]))
    return speeds


def _start(kind: str, config: EngineConfig, plugins: bool = True) -> Any:
    """An engine in a process of its own with all cores; it waits while another one works."""
    environment = worker_env(Resources(cpus=0, gpus=0, threads=os.cpu_count() or 1))
    if not plugins:
        environment["env_vars"]["VLLM_PLUGINS"] = ""
    return ray.remote(Engine).options(num_cpus=0, runtime_env=environment).remote(kind, config)


def _flops(batch: Batch) -> float:
    """FLOPs that a token of the batch needs on average: linear layers for all, the head for the completion's."""
    shapes, head = linear_shapes(batch.base)
    layers = sum(outputs * inputs for name, (outputs, inputs) in shapes.items() if name != head)
    outputs, inputs = shapes[head] if head else (0, 0)
    return 2 * (layers + outputs * inputs * COMPLETION / LENGTH)


def _tell(batch: Batch, seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        passes = ", ".join(f"{value:.2f}" for value in values)
        typer.echo(f"{len(batch.folders)} adapters of rank {batch.rank}, {name}: {passes} s", err=True)


if __name__ == "__main__":
    typer.run(main)
