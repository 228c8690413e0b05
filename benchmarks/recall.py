"""What the race finds for what it costs, against scoring every adapter on every sample.

    python -m benchmarks.recall [--quick] [--work FOLDER]                                     # made pools on a tiny base
    python -m benchmarks.recall [--quick] --base FOLDER --pool FOLDER --tasks FOLDER          # real ones; <task>/train.jsonl

For each pool every candidate is scored on every sample by the search itself with a budget of 1: that is the truth. Then the race
runs, for real, with the budget asked for and no known scores. On the recorded losses its rules run again with the samples
in other orders, for the spread over seeds. The truth is kept in the work folder; a second call uses it.

    cost_share     adapter-samples used / adapters x samples
    recall_at_k    share of the k best by the truth (search split) that are the k best of those that the race carried to the end
    regret         mean NLL of the 3 that the race found / of the 3 best, minus 1 (both on the search split)
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from benchmarks.pools import everything
from benchmarks.tiny import TARGETS, made_pool, target_samples, tiny_world
from pipeline.adapters.catalogue import build_catalogue
from pipeline.cluster.connect import connect
from pipeline.config import Config, SearchConfig
from pipeline.data.splits import take_samples
from pipeline.model.base_model import fingerprint
from pipeline.search.engine_pool import engine_config, score_stream
from pipeline.search.race import BASE, Race, make_schedule
from pipeline.search.score_store import Known
from pipeline.search.scoreboard import RaceProgress, Work

SIZES, QUICK_SIZES = (64, 256, 1024, 4096), (64, 1024)
KS = (1, 3, 8)


@dataclass(frozen=True)
class Arena:
    """A pool and a target to search it for."""

    name: str
    base: str
    adapters: pa.Table
    samples: pa.Table
    search: SearchConfig
    target_modules: tuple[str, ...]
    max_rank: int


def main(
    quick: Annotated[bool, typer.Option(help="Fewer sizes and targets.")] = False,
    base: Annotated[str, typer.Option(help="Base model folder of a real pool.")] = "",
    pool: Annotated[str, typer.Option(help="A real pool.")] = "",
    tasks: Annotated[str, typer.Option(help="Folder of target tasks, each with train.jsonl.")] = "",
    engine: Annotated[str, typer.Option(help="Engine for the real pool.")] = "vllm",
    samples: Annotated[int, typer.Option(help="Samples of a target, a quarter of them held out.")] = 0,
    budget: Annotated[float, typer.Option(help="Share of the exhaustive cost.")] = 0.1,
    seeds: Annotated[int, typer.Option(help="Orders of the samples that the rules are run with.")] = 5,
    work: Annotated[Path, typer.Option(help="Folder for what is made and measured.")] = Path(".cache/recall"),
) -> None:
    """Measure cost, recall and regret; the last line is a JSON object, of the largest pool or the mean over the targets."""
    if any((base, pool, tasks)) and not all((base, pool, tasks)):
        raise typer.BadParameter("--base, --pool and --tasks go together")
    connect()
    if base:
        arenas = _real(str(Path(base).resolve()), pool, Path(tasks), engine, samples or (32 if quick else 128), quick)
    else:
        arenas = _made(work.resolve(), samples or 128, QUICK_SIZES if quick else SIZES)
    results = []
    for arena in arenas:
        result = _measure(arena, work.resolve(), budget, seeds)
        typer.echo(json.dumps(result))
        results.append(result)
    if len(results) > 1 and not base:
        print(json.dumps({"growth_slope": _slope(results)}))
    largest = [result for result in results if result["n_adapters"] == max(one["n_adapters"] for one in results)]
    keys = ("n_adapters", "cost_share", "recall_at_1", "recall_at_3", "recall_at_8", "regret")
    means = {key: round(fmean(result[key] for result in largest), 4) for key in keys}
    print(json.dumps(means | {"n_adapters": largest[0]["n_adapters"]}))


def _made(work: Path, samples: int, sizes: tuple[int, ...]) -> Iterator[Arena]:
    base, donors = tiny_world(work / "tiny")
    holdout = samples // 4
    # A tiny model gains nothing from a second thread.
    search = SearchConfig(engine="transformers", dtype="float32", adapters_per_batch=16, cpus_per_actor=1)
    for size in sizes:
        adapters = made_pool(work / "tiny" / "made", base, donors, size)
        drawn = target_samples(0, samples - holdout, holdout)
        yield Arena(f"made {size}", base, adapters, drawn, search, tuple(TARGETS), 4)


def _real(base: str, pool: str, tasks: Path, engine: Any, samples: int, quick: bool) -> Iterator[Arena]:
    catalogue = build_catalogue(base, pool)
    valid = catalogue.filter(pa.compute.equal(catalogue["status"], "ok"))
    leaves = sorted({leaf for leaves in valid["target_modules"].to_pylist() for leaf in leaves})
    search = SearchConfig(engine=engine, samples=samples)
    for task in sorted(tasks.glob("*/train.jsonl"))[: 1 if quick else None]:
        config = Config(run="-", base=base, pool=pool, target={"train": str(task)}, search=search)
        drawn = take_samples(config).sample
        yield Arena(task.parent.name, base, valid, drawn, search, tuple(leaves), max(valid["rank"].to_pylist()))


def _measure(arena: Arena, work: Path, budget: float, seeds: int) -> dict[str, Any]:
    n, n_search = len(arena.adapters) + 1, arena.samples["split"].to_pylist().count("search")
    size = n, n_search, len(arena.samples) - n_search
    truth_store = work / "truth" / f"{fingerprint(arena.base)}-{arena.name.replace(' ', '-')}"
    truth, _, exhaustive_seconds = _search(arena, truth_store, make_schedule(*size, share=1))
    with tempfile.TemporaryDirectory() as fresh:
        _, raced, race_seconds = _search(arena, Path(fresh), make_schedule(*size, share=budget))
    assert raced.seen is not None
    real = _judge(truth, np.array(raced.seen), n_search, raced.adapter_samples)
    replays = [_replay(truth, n_search, budget, seed) for seed in range(seeds)]
    spread = {f"{key}_over_orders": [round(one[key], 4) for one in replays] for key in ("cost_share", "recall_at_3", "regret")}
    timed = {"race_seconds": race_seconds, "exhaustive_seconds": exhaustive_seconds}
    return {"pool": arena.name, "n_adapters": n - 1, **real, **timed, **spread}


def _search(arena: Arena, scores: Path, schedule: Any) -> tuple[Known, RaceProgress, float | None]:
    """Run a search; gives its scores, and the seconds of scoring alone (None where all was known)."""
    work: Work = everything(arena.adapters, arena.samples, scores)
    engine = engine_config(arena.base, arena.max_rank, arena.target_modules, arena.search, max_tokens=256)
    last, shown = RaceProgress(), time.monotonic()
    for last in score_stream(work, engine, arena.search, schedule):
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            typer.echo(f"{arena.name}: {last.adapter_samples} adapter-samples, rung {last.rung} of {last.rungs}", err=True)
    known = work.store.load(work.candidates["adapter_hash"].to_pylist(), work.samples)
    measured = last.adapter_samples == known.nll_NS.size or len(schedule.rungs) > 1
    return known, last, round(last.seconds, 1) if measured else None


def _replay(truth: Known, n_search: int, budget: float, seed: int) -> dict[str, float]:
    """The rules alone, on recorded losses with the search samples in another order."""
    n, n_samples = truth.nll_NS.shape
    order = np.append(np.random.default_rng(seed).permutation(n_search), np.arange(n_search, n_samples))
    nll_NS, tokens_S = truth.nll_NS[:, order].astype(np.float32), truth.tokens_S[order]
    race = Race(make_schedule(n, n_search, n_samples - n_search, budget), tokens_S.tolist(), np.full_like(nll_NS, np.nan))
    used = 0
    while not race.over:
        candidates, samples = race.take(1)
        used += len(candidates) * len(samples)
        for candidate in candidates:
            race.report(candidate, samples, nll_NS[candidate, samples].tolist())
    return _judge(truth, race.seen_N(), n_search, used)


def _slope(results: list[dict[str, Any]]) -> float:
    """Slope of adapter-samples used against adapters, on log-log axes."""
    sizes = np.array([result["n_adapters"] for result in results])
    costs = np.array([result["cost_share"] for result in results]) * sizes
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 3)


def _judge(truth: Known, seen_N: Any, n_search: int, used: int) -> dict[str, float]:
    """Cost, recall and regret of a race that carried some candidates to the end."""
    means_N = truth.nll_NS[:, :n_search].sum(axis=1) / truth.tokens_S[:n_search].sum()
    ranked = [int(place) for place in np.argsort(means_N, kind="stable") if place != BASE]
    found = [place for place in ranked if seen_N[place] == truth.nll_NS.shape[1]]
    recalls = {f"recall_at_{k}": len(set(ranked[:k]) & set(found[:k])) / k for k in KS}
    regret = float(means_N[found[:3]].mean() / means_N[ranked[:3]].mean() - 1)
    return {"cost_share": round(used / truth.nll_NS.size, 4), **recalls, "regret": round(regret, 5)}


if __name__ == "__main__":
    typer.run(main)
