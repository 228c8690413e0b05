"""The Ray Data plan of the search: a stream of adapters through a pool of actors, each with one scoring engine.

Each actor writes the scores of a batch of adapters as one Parquet file, whole or not at all, before it reports them; what
was reported is never lost, and a search that starts again leaves out what `ScoreFiles` has already.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from pipeline import cluster
from pipeline.config import SearchConfig
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer, build_scorer
from pipeline.errors import AdapterError
from pipeline.fetch import fetch_adapter
from pipeline.search.store import ScoreFiles
from pipeline.storage import Folder
from pipeline.tables import BASE_ID, SCORES

REPORT = pa.schema(
    [
        ("adapter_id", pa.string()),
        ("reason", pa.string()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("startup", pa.float64()),
    ]
)
"""One row an adapter as it is scored; `reason` where it could not be, `tokens` are those fed to the model."""


@dataclass(frozen=True)
class Work:
    """Adapters to score (columns adapter_id and uri, the base as BASE_ID), on which samples, into which files."""

    adapters: pa.Table
    samples: pa.Table
    scores: Folder


def engine_config(base: str, max_rank: int, target_modules: Iterable[str], search: SearchConfig, max_tokens: int) -> EngineConfig:
    """The engine that holds adapters up to `max_rank` on these modules."""
    resources = cluster.worker_resources(search.cpus_per_actor, search.gpus_per_actor)
    return EngineConfig(
        base=base,
        dtype=search.dtype,
        max_rank=max_rank,
        target_modules=tuple(sorted(target_modules)),
        max_tokens=max_tokens,
        adapters_per_batch=search.adapters_per_batch,
        tensor_parallel_size=max(1, resources.gpus),
    )


def score_stream(work: Work, engine: EngineConfig, search: SearchConfig) -> Iterator[dict[str, Any]]:
    """Score every adapter on every sample. Yields a row of schema REPORT an adapter, as soon as its scores are on disk."""
    if not len(work.adapters):
        return
    resources = cluster.worker_resources(search.cpus_per_actor, search.gpus_per_actor)
    batches = -(-len(work.adapters) // engine.adapters_per_batch)
    slots = cluster.engine_slots(resources) if search.actors == "auto" else search.actors
    reports = (
        ray.data.from_arrow(work.adapters)
        .repartition(target_num_rows_per_block=engine.adapters_per_batch)
        .map_batches(
            ScoringActor,
            batch_size=engine.adapters_per_batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=min(batches, slots)),
            fn_constructor_args=(search.engine, engine, work.samples, work.scores),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            runtime_env=cluster.worker_env(resources),
        )
    )
    yield from reports.iter_rows()


class ScoringActor:
    """Holds one engine; called by Ray Data with batches of (adapter_id, uri)."""

    def __init__(self, engine: str, config: EngineConfig, samples: pa.Table, scores: Folder):
        started = time.perf_counter()
        self.samples = samples
        self.files = ScoreFiles(scores)
        self.scorer: Scorer = build_scorer(engine, config)
        self.startup = time.perf_counter() - started

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mashup-") as cache:
            candidates, failures = _fetch(batch, Path(cache))
            scores, failed = self._score(candidates)
        failures |= failed
        self.files.write(scores, failures)
        yield self._report(batch["adapter_id"].to_pylist(), failures, time.perf_counter() - started)

    def _score(self, candidates: Sequence[Candidate]) -> tuple[pa.Table, dict[str, str]]:
        """Score a batch; if it fails, each of its adapters alone, so that one adapter stops no other."""
        if not candidates:
            return SCORES.empty_table(), {}
        try:
            return self.scorer.score(candidates, self.samples), {}
        except Exception as error:  # engines raise what they like; the reason is kept
            if len(candidates) == 1:
                return SCORES.empty_table(), {candidates[0].adapter_id: _first_line(error)}
        parts = [self._score([candidate]) for candidate in candidates]
        failures = {name: reason for _, failed in parts for name, reason in failed.items()}
        return pa.concat_tables([table for table, _ in parts]), failures

    def _report(self, adapters: list[str], failures: dict[str, str], seconds: float) -> pa.Table:
        tokens = sum(len(ids) for ids in self.samples["input_ids"])
        rows = [
            {
                "adapter_id": adapter,
                "reason": failures.get(adapter),
                "tokens": 0 if adapter in failures else tokens,
                "seconds": seconds / len(adapters),
                "startup": 0.0,
            }
            for adapter in adapters
        ]
        rows[0]["startup"], self.startup = self.startup, 0.0  # told once
        return pa.Table.from_pylist(rows, schema=REPORT)


def _fetch(batch: pa.Table, cache: Path) -> tuple[list[Candidate], dict[str, str]]:
    candidates: list[Candidate] = []
    failures: dict[str, str] = {}
    for row in batch.to_pylist():
        try:
            folder = None if row["adapter_id"] == BASE_ID else fetch_adapter(row["uri"], cache)
            candidates.append(Candidate(row["adapter_id"], folder))
        except AdapterError as error:
            failures[row["adapter_id"]] = str(error)
    return candidates, failures


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"scoring failed: {type(error).__name__}: {lines[0]}"
