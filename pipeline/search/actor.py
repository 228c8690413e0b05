"""The actor that holds one scoring engine: takes work from the scoreboard, scores it, stores the scores and reports them."""

import faulthandler
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.exceptions import RayActorError

from pipeline.adapters.cache import AdapterCache
from pipeline.cluster.telemetry import WorkerLog, worker_log
from pipeline.core.errors import AdapterError, first_line
from pipeline.core.tables import BASE_ID, SCORES
from pipeline.engines.canary import EngineFaultError, proven_scorer
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer
from pipeline.search.indexed import IndexedAdapters
from pipeline.search.lobby import OpenRace
from pipeline.search.score_store import News, record_failures
from pipeline.search.scoreboard import ScoringJob


class ScoringActor:
    """Holds one engine; called by Ray Data with a ticket."""

    patience = 600.0
    """Seconds that a batch may take beyond ten times what it should."""

    def __init__(self, engine: str, config: EngineConfig, lobby: Any) -> None:
        started = time.perf_counter()
        self.lobby, self.number, self.batch = lobby, 0, config.adapters_per_batch
        self.adapters, self.ahead, self.indexed = AdapterCache(ahead=2 * self.batch), set[str](), IndexedAdapters()
        self.name = ray.get_runtime_context().get_actor_id()  # the same after a restart
        if not self._enter():
            raise RuntimeError("the search ended before this engine started")
        self._tell(self.board.hello, self.name)
        self.scorer = self._start(engine, config)
        self.token_seconds = 0.01  # of the last batch; what a slow machine needs, until there was one
        self.warm = False
        startup = time.perf_counter() - started
        self._log().info("engine up in %.1f s", startup)
        self._tell(self.board.ready, startup)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Do the ticket's jobs; with `jobs` 0, all that there are until no further race is to come."""
        left = batch["jobs"][0].as_py() or math.inf
        while left > 0 and (job := self._next_job()):
            self._do(job)
            left -= 1
        return batch

    def _start(self, engine: str, config: EngineConfig) -> Scorer:
        """An engine that can be believed. One that cannot ends the race, before it has scored anything."""
        try:
            return proven_scorer(engine, config, self.work.samples, self.work.store.folder.sub("canary"))
        except EngineFaultError as fault:
            self._refuse(fault)
            raise

    def _refuse(self, fault: EngineFaultError) -> None:
        self._log().error("%s", fault)
        self._tell(self.board.refuse, str(fault))

    def _next_job(self) -> ScoringJob | None:
        """Of this race, or where it is over of the next one; None: there is none to come."""
        while True:
            job: ScoringJob | None = self._tell(self.board.take, self.name, self.batch)
            if job or not self._enter():
                return job
            self._tell(self.board.ready, 0.0)

    def _enter(self) -> bool:
        """Wait for a race to take part in; False: none is to come."""
        if (called := self._tell(self.lobby.wait, self.number)) is None:
            return False
        self.number, [race] = called
        entered: OpenRace = ray.get(race)
        self.work, self.board = entered.work, entered.board
        self.news = News(self.work.store, self.work.samples, entered.files)
        return True

    def _tell(self, method: Any, *told: Any) -> Any:
        """Call the lobby or the scoreboard. None: it is gone, as all is over."""
        try:
            return ray.get(method.remote(*told))
        except RayActorError:
            return None

    def _do(self, job: ScoringJob) -> None:
        samples = self.work.samples.take(job.samples)
        found = self._found(job, samples)
        missing = [row for row in job.candidates if row not in found]
        rows = self.work.candidates.take(pa.array(missing, pa.int64()))  # there may be none
        with ExitStack() as leases:
            candidates, failures = self._fetch(rows, leases)
            self._fetch_ahead(set(job.upcoming), set(rows["uri"].to_pylist()))
            tokens, before = len(candidates) * sum(len(ids) for ids in samples["input_ids"]), self.scorer.loaded.so_far()
            scores, failed = self._watched(candidates, samples, tokens)
            failed |= self.indexed.changed(candidates)
        scores = scores.filter(pc.invert(pc.is_in(scores["adapter_id"], pa.array(list(failed), pa.string()))))
        record_failures(self.work.failures, failures | failed)
        names = rows["adapter_id"].to_pylist()
        self._note(names, failures | failed, len(samples))
        if len(scores):
            self.news.skip(self.work.store.write(scores, dict(zip(names, rows["adapter_hash"].to_pylist(), strict=True))))
        nll = _by_row(scores, dict(zip(names, missing, strict=True)))
        loaded = self.scorer.loaded.since(before)
        self._tell(self.board.report, self.name, nll | found, tokens, len(found), loaded, self.warm)
        self.warm = self.warm or any(candidate.folder for candidate in candidates)  # their kernels are compiled by now

    def _fetch(self, rows: pa.Table, leases: ExitStack) -> tuple[list[Candidate], dict[str, str]]:
        """The adapters of a batch, as long as the leases last, and of those that cannot be had the reasons."""
        candidates: list[Candidate] = []
        failures: dict[str, str] = {}
        for row in rows.to_pylist():
            candidate = Candidate(row["adapter_id"], None)
            try:
                if candidate.adapter_id != BASE_ID:
                    candidate = replace(candidate, folder=leases.enter_context(self.adapters.lease(row["uri"])))
                    self.indexed.require(candidate, row["adapter_hash"])
                candidates.append(candidate)
            except AdapterError as error:
                failures[row["adapter_id"]] = str(error)
        return candidates, failures

    def _found(self, job: ScoringJob, samples: pa.Table) -> dict[int, list[float]]:
        """Losses of the candidates, by their rows, that another run has scored on these samples since the race began."""
        hashes = self.work.candidates["adapter_hash"].take(job.candidates).to_pylist()
        known = self.news.known(hashes, samples["sample_id"].to_pylist())
        return {row: known[one] for row, one in zip(job.candidates, hashes, strict=True) if one in known}

    def _fetch_ahead(self, upcoming: set[str], current: set[str]) -> None:
        """Bring the next adapters onto this node while these are scored; give up those that went to other engines."""
        for uri in self.ahead - upcoming - current:
            self.adapters.release(uri)
        self.adapters.prefetch(upcoming)
        self.ahead = upcoming

    def _watched(self, candidates: Sequence[Candidate], samples: pa.Table, tokens: int) -> tuple[pa.Table, dict[str, str]]:
        """Score a batch. A process that hangs in it is ended, wherever it hangs, so that Ray starts another one."""
        started = time.perf_counter()
        faulthandler.dump_traceback_later(self.patience + 10 * tokens * self.token_seconds, exit=True)
        try:
            return self._score(candidates, samples)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.token_seconds = (time.perf_counter() - started) / max(1, tokens)

    def _score(self, candidates: Sequence[Candidate], samples: pa.Table) -> tuple[pa.Table, dict[str, str]]:
        """Score a batch; if it fails, each of its adapters alone, so that one adapter stops no other; if the engine's memory is
        too small for it, which says nothing of any adapter, in two parts."""
        if not candidates:
            return SCORES.empty_table(), {}
        try:
            return self.scorer.score(candidates, samples), {}
        except Exception as error:  # engines raise what they like; the reason is kept
            self._log(*(candidate.adapter_id for candidate in candidates)).warning("scoring failed", exc_info=True)
            reason, too_large = f"scoring failed: {type(error).__name__}: {first_line(error)}", _is_out_of_memory(error)
        if len(candidates) == 1 and not too_large:
            self._require_engine(samples)
            return SCORES.empty_table(), {candidates[0].adapter_id: reason}
        batches = self._halves(candidates, samples) if too_large else [([candidate], samples) for candidate in candidates]
        parts = [self._score(*batch) for batch in batches]
        failures = {name: reason for _, failed in parts for name, reason in failed.items()}
        return pa.concat_tables([table for table, _ in parts]), failures

    def _halves(self, candidates: Sequence[Candidate], samples: pa.Table) -> list[tuple[Sequence[Candidate], pa.Table]]:
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
        self._refuse(fault)
        raise fault

    def _require_engine(self, samples: pa.Table) -> None:
        """An engine that cannot score the base any more is dead, whatever killed it; Ray starts another process."""
        try:
            self.scorer.score([Candidate(BASE_ID, None)], samples.slice(0, 1))
        except Exception:
            self._log(BASE_ID).exception("the engine is dead")
            os._exit(1)

    def _note(self, names: Sequence[str], failures: dict[str, str], n_samples: int) -> None:
        for name, reason in failures.items():
            self._log(name).warning("set aside: %s", reason)
        if scored := [name for name in names if name not in failures]:
            self._log(*scored).info("scored on %d samples, %.3g s a token", n_samples, self.token_seconds)

    def _log(self, *adapters: str) -> WorkerLog:
        return worker_log(self.work.stage, ",".join(adapters) or "-")


def _by_row(scores: pa.Table, row_of: dict[str, int]) -> dict[int, list[float]]:
    """Candidate's row -> its losses, sample after sample."""
    found: dict[int, list[float]] = {}
    for name, nll in zip(scores["adapter_id"].to_pylist(), scores["nll_sum"].to_pylist(), strict=True):
        found.setdefault(row_of[name], []).append(nll)
    return found


def _is_out_of_memory(error: Exception) -> bool:
    """Also of an engine's worker process, of which the text alone comes through."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
