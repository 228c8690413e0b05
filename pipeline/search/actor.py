"""The actor that holds one scoring engine. Batches of work come to it through Ray Data, and it reports what it made of them.

Two batches and more are in it at a time, each in a thread of its own: while one is scored, the adapters of the next are read into
memory, and those of the one after it come onto this node.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.exceptions import RayActorError

from pipeline.adapters.cache import AdapterCache
from pipeline.cluster.resources import share_of_node
from pipeline.cluster.telemetry import WorkerLog, worker_log
from pipeline.core.errors import AdapterError, InputError, first_line
from pipeline.core.tables import BASE_ID, SCORES
from pipeline.engines.canary import EngineFaultError, proven_scorer
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer
from pipeline.search.batch import NOTHING, Batch, Begun, Report
from pipeline.search.indexed import IndexedAdapters
from pipeline.search.scoreboard import Work

KEPT_SHARE = 0.25
"""Of a node's memory, for adapters that its engines may need again."""

FETCHERS = 4
"""Adapters that are fetched and checked at a time."""

DONE = pa.schema([("batch", pa.string())])


class ScoringActor:
    """Holds one engine; called by Ray Data with a batch of work."""

    patience = 600.0
    """Seconds that a batch may take beyond ten times what it should."""

    def __init__(self, engine: str, config: EngineConfig, dispatcher: Any, cpus: float | None) -> None:
        """`cpus`: those that it computes with, where it has no GPU."""
        started = time.perf_counter()
        self.dispatcher = dispatcher
        self.adapters, self.indexed = AdapterCache(max_bytes=config.disk_bytes), IndexedAdapters()
        self.folders: dict[str, Path] = {}
        self.fetchers = ThreadPoolExecutor(FETCHERS)
        self.name = ray.get_runtime_context().get_actor_id()  # the same after a restart
        self.reading, self.scoring = threading.Lock(), threading.Lock()
        self.engine = ThreadPoolExecutor(1)  # one thread for all calls: libraries keep settings by thread
        work: Work | None = self._tell(dispatcher.work)
        if work is None:
            raise RuntimeError("the search ended before this engine started")
        if config.kept_bytes is None:
            share, memory = share_of_node(cpus)
            config = replace(config, kept_bytes=round(KEPT_SHARE * share * memory))
        self.scorer = self._start(engine, config, work)
        self.token_seconds = 0.01  # of the last batch; what a slow machine needs, until there was one
        self.warm, self.idle_since = False, time.perf_counter()
        self.loaded = self.scorer.loaded.so_far()
        startup = time.perf_counter() - started
        worker_log(work.stage).info("engine up in %.1f s", startup)
        self._tell(dispatcher.engine_up, self.name, startup)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a batch of work and report it. Runs in several threads."""
        batch = Batch.from_block(block)
        if not batch.alone:
            return self._do(batch, self._in_turn)
        # An engine died while it had this batch. If another does so now, it is of this one: no other is scored or read meanwhile.
        with self.reading, self.scoring:
            return self._do(batch, lambda candidates: nullcontext())

    def _start(self, engine: str, config: EngineConfig, work: Work) -> Scorer:
        """An engine that can be believed. One that cannot, or that has no use for the base, ends the race before it has scored
        anything."""
        try:
            return proven_scorer(engine, config, work.samples, work.store.folder.sub("canary"))
        except (EngineFaultError, InputError) as fault:
            self._refuse(fault, work.stage)
            raise fault.with_traceback(None) from None  # Ray prints what an actor ends with, and all that led to it

    def _refuse(self, fault: EngineFaultError | InputError, stage: str) -> None:
        worker_log(stage).error("%s", fault, exc_info=fault)
        self._tell(self.dispatcher.refuse, fault)

    def _tell(self, method: Any, *told: Any) -> Any:
        """Call the dispatcher. None: it is gone, as all is over."""
        try:
            return ray.get(method.remote(*told))
        except RayActorError:
            return None

    def _do(self, batch: Batch, turn: Callable[[Sequence[Candidate]], AbstractContextManager[None]]) -> pa.Table:
        came = time.perf_counter()
        begun: Begun = self._tell(self.dispatcher.begin, self.name, batch.race, batch.number) or NOTHING
        self._let_go(begun.stopped)
        if len(begun.wanted):
            batch = replace(batch, candidates=begun.wanted)
            with ExitStack() as leases:
                candidates, failures = self._fetch(batch.candidates, leases)
                with turn(candidates):
                    report = self.engine.submit(self._score_batch, batch, candidates, failures, came).result()
            self._tell(self.dispatcher.report, report)
        return pa.table([[batch.number]], schema=DONE)

    @contextmanager
    def _in_turn(self, candidates: Sequence[Candidate]) -> Iterator[None]:
        """Read adapters into memory, and wait until the engine is free for them."""
        with self.reading:
            with self._reading_watched():
                for candidate in candidates:
                    self.scorer.load_ahead(candidate)
            self.scoring.acquire()  # before the next batch is read: there is room in memory for one
        try:
            yield
        finally:
            self.scoring.release()

    def _let_go(self, uris: Sequence[str]) -> None:
        """Adapters that will not be scored again make room for others, in memory and on disk."""
        self.scorer.let_go_first([folder for uri in uris if (folder := self.folders.pop(uri, None))])
        self.adapters.let_go_first(uris)

    def _fetch(self, rows: pa.Table, leases: ExitStack) -> tuple[list[Candidate], dict[str, str]]:
        """The adapters of a batch, as long as the leases last, and of those that cannot be had the reasons."""
        candidates: list[Candidate] = []
        failures: dict[str, str] = {}
        coming = [(row["adapter_id"], self.fetchers.submit(self._obtain, **row)) for row in rows.to_pylist()]
        for name, future in coming:
            try:
                candidate, uri = future.result()
            except AdapterError as error:
                failures[name] = str(error)
                continue
            if uri:
                leases.callback(self.adapters.release, uri)
            candidates.append(candidate)
        return candidates, failures

    def _obtain(self, adapter_id: str, uri: str | None, adapter_hash: str, state: str | None) -> tuple[Candidate, str | None]:
        """An adapter that is on this node and is what was indexed, and what is to be released; the base needs nothing."""
        if uri is None:
            return Candidate(adapter_id, None), None
        hold = self.adapters.hold(uri)
        self.folders[uri] = hold.folder
        candidate = Candidate(adapter_id, hold.folder)
        try:
            self.indexed.require(candidate, adapter_hash, state, hold.state)
        except AdapterError:
            self.adapters.release(uri)
            raise
        return candidate, uri

    def _score_batch(self, batch: Batch, candidates: Sequence[Candidate], failures: dict[str, str], came: float) -> Report:
        started = time.perf_counter()
        waited = started - max(came, self.idle_since)
        tokens = len(candidates) * sum(len(ids) for ids in batch.samples["input_ids"])
        with self._watched(tokens):
            scores, failed = self._score(candidates, batch.samples, batch.stage)
        failed |= self.indexed.changed(candidates)
        scores = scores.filter(pc.invert(pc.is_in(scores["adapter_id"], pa.array(list(failed), pa.string()))))
        self._note(batch, failures | failed)
        loaded, self.loaded = self.scorer.loaded.since(self.loaded), self.scorer.loaded.so_far()
        warm, self.warm = self.warm, self.warm or any(candidate.folder for candidate in candidates)  # kernels are compiled
        self.idle_since = time.perf_counter()
        seconds = self.idle_since - started
        return Report(batch.race, batch.number, scores, failures | failed, tokens, seconds, max(0.0, waited), loaded, warm)

    @contextmanager
    def _reading_watched(self) -> Iterator[None]:
        """Within, adapters are read; for a disk that hangs, this process would wait for ever. Faulthandler, which would see more,
        has one timer in a process: the one of `_watched`."""
        watch = threading.Timer(self.patience, _exit_with_traceback)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    @contextmanager
    def _watched(self, tokens: int) -> Iterator[None]:
        """Within, so many tokens are scored. A process that hangs in it is ended, wherever it hangs; Ray starts another."""
        started = time.perf_counter()
        faulthandler.dump_traceback_later(self.patience + 10 * tokens * self.token_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.token_seconds = (time.perf_counter() - started) / max(1, tokens)

    def _score(self, candidates: Sequence[Candidate], samples: pa.Table, stage: str) -> tuple[pa.Table, dict[str, str]]:
        """Score a batch; if it fails, each of its adapters alone, so that one adapter stops no other; if the engine's memory is
        too small for it, which says nothing of any adapter, in two parts."""
        if not candidates:
            return SCORES.empty_table(), {}
        try:
            return self.scorer.score(candidates, samples), {}
        except Exception as error:  # engines raise what they like; the reason is kept
            worker_log(stage, _names(candidates)).warning("scoring failed", exc_info=True)
            reason, too_large = f"scoring failed: {type(error).__name__}: {first_line(error)}", _is_out_of_memory(error)
        if len(candidates) == 1 and not too_large:
            self._require_engine(samples, stage)
            return SCORES.empty_table(), {candidates[0].adapter_id: reason}
        batches = self._halves(candidates, samples, stage) if too_large else [([candidate], samples) for candidate in candidates]
        parts = [self._score(*batch, stage) for batch in batches]
        failures = {name: reason for _, failed in parts for name, reason in failed.items()}
        return pa.concat_tables([table for table, _ in parts]), failures

    def _halves(
        self, candidates: Sequence[Candidate], samples: pa.Table, stage: str
    ) -> list[tuple[Sequence[Candidate], pa.Table]]:
        """A batch as two: each has half of its samples, or of its candidates where it has one sample.

        Raises:
            EngineFaultError: it is one candidate on one sample; the race is told.
        """
        if middle := len(samples) // 2:
            return [(candidates, samples.slice(0, middle)), (candidates, samples.slice(middle))]
        if middle := len(candidates) // 2:
            return [(candidates[:middle], samples), (candidates[middle:], samples)]
        length = len(samples["input_ids"][0])
        fault = EngineFaultError(
            f"the engine's memory is too small for one adapter on one sample of {length} tokens; set a smaller "
            "target.max_tokens, or more GPUs for each engine (search.gpus_per_actor)"
        )
        self._refuse(fault, stage)
        raise fault

    def _require_engine(self, samples: pa.Table, stage: str) -> None:
        """An engine that cannot score the base any more is dead, whatever killed it; Ray starts another process."""
        try:
            self.scorer.score([Candidate(BASE_ID, None)], samples.slice(0, 1))
        except Exception:
            worker_log(stage, BASE_ID).exception("the engine is dead")
            os._exit(1)

    def _note(self, batch: Batch, failures: dict[str, str]) -> None:
        for name, reason in failures.items():
            worker_log(batch.stage, name).warning("set aside: %s", reason)
        if scored := [name for name in batch.candidates["adapter_id"].to_pylist() if name not in failures]:
            log: WorkerLog = worker_log(batch.stage, ",".join(scored))
            log.info("scored on %d samples, %.3g s a token", len(batch.samples), self.token_seconds)


def _exit_with_traceback() -> None:
    faulthandler.dump_traceback()
    os._exit(1)


def _names(candidates: Sequence[Candidate]) -> str:
    return ",".join(candidate.adapter_id for candidate in candidates)


def _is_out_of_memory(error: Exception) -> bool:
    """Also of an engine's worker process, of which the text alone comes through."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
