"""How well the cheap screen foretells the true losses of a real pool, and what it costs.

    python -m benchmarks.screen [--quick] [--base FOLDER] [--pool FOLDER] [--tasks FOLDER] [--scores FOLDER]

By default the pool and the tasks of the demo. For each target task, over the donors that were not trained on it:
    rho         Spearman rank correlation of estimate and true NLL, both on the same samples
    half@k      share of the truly best k donors among the half of the pool with the lowest estimates (a draw: 0.5)
    quarter@k   the same for the best quarter (a draw: 0.25)
    lost        true NLL of the best donor kept minus that of the best donor of all, nats a token
`1 sample` and `4 samples` are what the adapters' losses on so few samples foretell of those on the others, the mean over
disjoint draws.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import typer
from numpy.typing import NDArray

from benchmarks.pools import everything
from examples.tasks import DONORS, TARGET, draw
from pipeline.adapters.adapter import Adapter, read_adapter
from pipeline.adapters.catalogue import build_catalogue
from pipeline.cluster.connect import connect
from pipeline.cluster.resources import worker_env, worker_resources
from pipeline.config import SearchConfig
from pipeline.core.ledger import digest
from pipeline.core.tables import SAMPLES
from pipeline.data.tokenise import tokenise
from pipeline.model.base_model import fast_dtype, load_model, load_tokenizer
from pipeline.search.engine_pool import engine_config, score_stream
from pipeline.search.race import make_plan
from pipeline.search.scoreboard import Work
from pipeline.search.screen import Gradients, first_order, touched_modules, weight_gradients

MAX_TOKENS = 256
FEW = {"1 sample": 1, "4 samples": 4}
TOP = (1, 3, 8)
KEPT = {"half": 0.5, "quarter": 0.25}

Values = NDArray[np.float64]


def delta_norm(adapter: Adapter) -> float:
    """Frobenius norm of all delta weights: ||B A||^2 = sum((B^T B) * (A A^T))."""
    squares = 0.0
    for module in adapter.modules:
        delta = adapter.factors(module)
        squares += float(((delta.b_OR.T @ delta.b_OR) * (delta.a_RI @ delta.a_RI.T)).sum())
    return squares**0.5


def cosine(gradients: Gradients, adapter: Adapter) -> float:
    """The direction alone: <G, D> / ||D||."""
    return first_order(gradients, adapter) / delta_norm(adapter)


ESTIMATES: dict[str, Callable[[Gradients, Adapter], float]] = {"first order": first_order, "cosine": cosine}


def main(
    base: Annotated[str, typer.Option(help="Base model folder.")] = ".cache/SmolLM2-135M-Instruct",
    pool: Annotated[str, typer.Option(help="Adapter pool.")] = "examples/pool",
    tasks: Annotated[str, typer.Option(help="Folder of <task>/train.jsonl; by default the demo's tasks.")] = "",
    scores: Annotated[str, typer.Option(help="Folder that keeps true scores for the next time.")] = "",
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "transformers",
    samples: Annotated[int, typer.Option(help="Rows of each target.")] = 32,
    quick: Annotated[bool, typer.Option(help="One target of 8 rows.")] = False,
) -> None:
    """Measure the screen on every target; print a table and one JSON object."""
    base = str(Path(base).resolve())  # workers run in other folders than this command
    targets = target_samples(base, tasks, 8 if quick else samples)
    connect()
    catalogue = build_catalogue(base, str(Path(pool).resolve()))
    catalogue = catalogue.filter(pc.equal(catalogue["status"], "ok"))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(base, catalogue, SearchConfig(engine=engine, actors=1), Path(scores or scratch).resolve())
        found: dict[str, Any] = {}
        for name in list(targets)[: 1 if quick else None]:
            found[name] = bench.measure(name, targets[name])
            typer.echo(f"so far: {name} {found[name]}", err=True)
        cost = bench.cost(next(iter(targets.values())))
    print(report(found))
    mean = {estimate: average([one["found"][estimate] for one in found.values()]) for estimate in (*ESTIMATES, *FEW)}
    print(json.dumps({"donors": len(catalogue), "targets": len(found), "mean": mean, "cost": cost}))


@dataclass(frozen=True)
class Bench:
    """A base, its pool (catalogue rows) and how it is truly scored."""

    base: str
    catalogue: pa.Table
    search: SearchConfig
    scores: Path

    def measure(self, target: str, samples: pa.Table) -> dict[str, Any]:
        """What each estimate foretells of the true losses on a target, its own donor left out."""
        donors = self.catalogue.filter(pc.not_equal(self.catalogue["adapter_id"], target))
        nll_DS, tokens_S = self._true_scores(f"{target}-{digest(samples['input_ids'].to_pylist())}", donors, samples)
        truth = nll_DS.sum(axis=1) / tokens_S.sum()
        screened = self._screen(donors, samples)
        found = {name: foretold(np.array(values), truth) for name, values in screened["estimates"].items()}
        for name, few in FEW.items():
            draws = [slice(start, start + few) for start in range(0, len(tokens_S) - few + 1, few)]
            found[name] = average([few_foretell(nll_DS, tokens_S, drawn) for drawn in draws])
        best, worst = float(truth.min()), float(truth.max())
        return {"found": found, "best": best, "worst": worst, "helpful": int((truth < 0).sum())}

    def cost(self, samples: pa.Table) -> dict[str, float]:
        """Seconds of the screen on all `samples`, and of scoring each adapter on 4 of them; starts and loading the base apart."""
        screened = self._screen(self.catalogue, samples)
        with tempfile.TemporaryDirectory() as scratch:
            few = self._score(self.catalogue, samples.slice(0, 4), Path(scratch))[1]
        each, count = screened["adapter_seconds"], len(self.catalogue)
        return {
            "backward_seconds": round(screened["backward_seconds"], 2),
            "screen_seconds_an_adapter": round(each, 3),
            "few_seconds_an_adapter": round(few / count, 3),
            "screen_over_few": round((screened["backward_seconds"] + each * count) / few, 3),
            "screen_over_few_in_a_large_pool": round(each * count / few, 3),
        }

    def _true_scores(self, name: str, donors: pa.Table, samples: pa.Table) -> tuple[Values, Values]:
        """Summed NLL minus the base's, shape (donors, samples), and completion tokens, shape (samples,)."""
        work = self._score(donors, samples, self.scores / name)[0]
        known = work.store.load(work.candidates["adapter_hash"].to_pylist(), samples)
        return known.nll_NS[1:] - known.nll_NS[0], known.tokens_S.astype(np.float64)

    def _score(self, adapters: pa.Table, samples: pa.Table, folder: Path) -> tuple[Work, float]:
        """Score what has no scores yet. Gives the work, and the seconds that it took, engine start apart."""
        leaves = {leaf for row in self.catalogue["target_modules"].to_pylist() for leaf in row}
        engine = engine_config(self.base, pc.max(self.catalogue["rank"]).as_py(), leaves, self.search, MAX_TOKENS)
        work = everything(adapters, samples, folder)
        *_, last = score_stream(work, engine, self.search, make_plan(len(work.candidates), len(samples), 0, share=1))
        return work, last.seconds

    def _screen(self, donors: pa.Table, samples: pa.Table) -> dict[str, Any]:
        """A Ray task only for a process with the same threads as the engine's."""
        resources = worker_resources("auto", "auto")
        asked = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "runtime_env": worker_env(resources)}
        task = ray.remote(**asked)(screen_timed)
        modules = touched_modules(self.base, donors["target_modules"].to_pylist())
        result: dict[str, Any] = ray.get(task.remote(self.base, samples, modules, donors["uri"].to_pylist()))
        return result


def screen_timed(base: str, samples: pa.Table, modules: list[str], folders: list[str]) -> dict[str, Any]:
    """Every estimate of every donor; seconds of the backward pass, and an adapter for reading it and its first-order estimate."""
    model = load_model(base, fast_dtype("auto"))
    started = time.perf_counter()
    gradients = weight_gradients(model, samples, modules)
    backward = time.perf_counter() - started
    started = time.perf_counter()
    for folder in folders:
        first_order(gradients, read_adapter(Path(folder)))
    each = (time.perf_counter() - started) / len(folders)
    adapters = [read_adapter(Path(folder)) for folder in folders]
    estimates = {name: [estimate(gradients, adapter) for adapter in adapters] for name, estimate in ESTIMATES.items()}
    return {"backward_seconds": backward, "adapter_seconds": each, "estimates": estimates}


def foretold(estimate: Values, truth: Values) -> dict[str, float]:
    """How much an estimate tells of the true losses; both of shape (donors,), lower is better."""
    by_estimate, by_truth = estimate.argsort(), truth.argsort()
    found = {"rho": float(np.corrcoef(by_estimate.argsort(), by_truth.argsort())[0, 1])}
    for name, share in KEPT.items():
        kept = by_estimate[: math.ceil(share * len(truth))]
        found |= {f"{name}@{k}": len(np.intersect1d(kept, by_truth[:k])) / k for k in TOP}
        found[f"lost {name}"] = float(truth[kept].min() - truth.min())
    return found


def few_foretell(nll_DS: Values, tokens_S: Values, drawn: slice) -> dict[str, float]:
    """How much the losses on the samples `drawn` tell of those on all the others."""
    others = np.delete(nll_DS, drawn, axis=1).sum(axis=1) / np.delete(tokens_S, drawn).sum()
    return foretold(nll_DS[:, drawn].sum(axis=1), others)


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}


def report(found: dict[str, Any]) -> str:
    """Markdown: a line for each target and estimate."""
    columns = list(next(iter(next(iter(found.values()))["found"].values())))
    lines = ["| target | best donor | estimate | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 3) + "|"]
    for target, one in found.items():
        for estimate, values in one["found"].items():
            figures = " | ".join(f"{values[column]:.2f}" for column in columns)
            lines.append(f"| {target} | {one['best']:+.3f} | {estimate} | {figures} |")
    return "\n".join(lines)


def target_samples(base: str, tasks: str, count: int) -> dict[str, pa.Table]:
    """`count` seeded rows of each target, of schema SAMPLES."""
    if tasks:
        files = sorted(Path(tasks).glob("*/train.jsonl"))
        rows = {file.parent.name: [json.loads(line) for line in file.read_text().split("\n") if line.strip()] for file in files}
    else:
        rows = {name: draw(make, "screen", count) for name, make in {"reviews-gadgets": TARGET, **DONORS}.items()}
    return {name: _tokenised(base, Random(0).sample(found, len(found)), count) for name, found in rows.items()}


def _tokenised(base: str, rows: list[dict[str, str]], count: int) -> pa.Table:
    tokenizer = load_tokenizer(base)
    encoded = (tokenise(row, tokenizer) for row in rows)
    short = islice((one for one in encoded if len(one["input_ids"]) <= MAX_TOKENS), count)
    return pa.Table.from_pylist([{"sample_id": str(n), "split": "search", **one} for n, one in enumerate(short)], schema=SAMPLES)


if __name__ == "__main__":
    typer.run(main)
