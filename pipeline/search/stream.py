"""The Ray Data plan of the search: a stream of tickets through a pool of actors, each with one scoring engine.

A ticket stands for one batch of work; which, the scoreboard says when the ticket is used, as who goes on depends on the scores so
far. So one engine start serves the whole race, and the next one too: between two races engines wait in the lobby. Ray Data
grows and shrinks the pool with the cluster, and gives the ticket of an actor that died to another. An actor stores the scores
of a batch, whole or not at all, before it reports them.
"""

import asyncio
import faulthandler
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cluster
from pipeline.basemodel import fast_dtype
from pipeline.cache import AdapterCache
from pipeline.config import SearchConfig
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer, build_scorer
from pipeline.errors import AdapterError
from pipeline.observe import WorkerLog, worker_log
from pipeline.search.board import Job, Progress, Scoreboard, Work
from pipeline.search.race import Plan
from pipeline.search.store import record_failures
from pipeline.tables import BASE_ID, SCORES

IN_FLIGHT = 2
"""Tickets that an actor has at hand: the one that it works on and the next."""

POLL = 1.0
"""Seconds between two looks at the scoreboard."""

PATIENCE = 60.0
"""Seconds that engines which are let go may take for it."""

MAX_TICKETS = 512
"""Of the first rung, and of those that end the race, each good for all the work that is left: Ray Data keeps a record of each in
the driver's memory."""


def engine_config(base: str, max_rank: int, target_modules: Iterable[str], search: SearchConfig, max_tokens: int) -> EngineConfig:
    """The engine that holds adapters up to `max_rank` on these modules."""
    resources = scoring_resources(search)
    return EngineConfig(
        base=base,
        dtype=scoring_dtype(search),
        max_rank=max_rank,
        target_modules=tuple(sorted(target_modules)),
        max_tokens=max_tokens,
        adapters_per_batch=search.adapters_per_batch,
        tensor_parallel_size=max(1, resources.gpus),
    )


def scoring_dtype(search: SearchConfig) -> str:
    """The type that all engines of a search compute in, so that their scores compare. auto: bfloat16 on GPUs, on CPUs what
    this machine is fast at."""
    if search.dtype != "auto":
        return search.dtype
    return "bfloat16" if scoring_resources(search).gpus else str(fast_dtype("auto")).removeprefix("torch.")


def scoring_resources(search: SearchConfig) -> cluster.Resources:
    """What one engine gets: on CPUs a whole node."""
    return cluster.worker_resources(search.cpus_per_actor, search.gpus_per_actor, spare=0)


def scoring_kind(search: SearchConfig) -> str:
    """What a measured speed of scoring holds for, beside the scope of the score store."""
    return f"scoring, {search.adapters_per_batch} adapters a batch, {cluster.describe(scoring_resources(search))}"


def engines_at_once(search: SearchConfig, candidates: int) -> int:
    """How many engines score so many candidates where the cluster is all ours."""
    batches = math.ceil(candidates / search.adapters_per_batch)
    slots = cluster.engine_slots(scoring_resources(search), spare=0)
    return max(1, min(slots, batches if search.actors == "auto" else search.actors))


def require_engine(search: SearchConfig) -> None:
    """See to it that the cluster can hold an engine.

    Raises:
        InputError: it cannot.
    """
    cluster.require(scoring_resources(search), "search")


def score_stream(
    work: Work, engine: EngineConfig, search: SearchConfig, plan: Plan, seconds: float | None = None
) -> Iterator[Progress]:
    """One race with engines of its own; as `Engines.race`."""
    return Engines(search).race(work, engine, plan, seconds)


class Engines:
    """A pool of scoring engines: of each race its own, or `kept` up from one race to the next."""

    def __init__(self, search: SearchConfig):
        self._search = search
        self.keeping = False
        self._engine: EngineConfig | None = None
        self._lobby: Any = None
        self._running: Future[int] | None = None
        self._races = 0
        self._idle = True

    def race(self, work: Work, engine: EngineConfig, plan: Plan, seconds: float | None = None) -> Iterator[Progress]:
        """Run the race over what has no scores yet. Yields how far it is about every second; the last says that it is over.

        Args:
            engine: what the race needs; engines that are up and can hold it serve it.
            seconds: the time that it may take, engine start apart, in place of the plan's budget.

        Raises:
            InputError: no node of the cluster can hold an engine.
        """
        board = _on_this_node(Scoreboard).remote(work, plan, seconds)
        try:
            if not ray.get(board.progress.remote()).over:
                running = self._up(engine, len(work.candidates))
                yield from self._follow(ray.put(Race(work, board)), board, running)
            yield ray.get(board.progress.remote())
        finally:
            ray.kill(board)
            if not self.keeping:
                self.close()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within, the engines that a race started stay up for the next one."""
        self.keeping = True
        try:
            yield
        finally:
            self.keeping = False
            self.close()

    def leave_room(self) -> bool:
        """Let something else compute until the next race. On GPUs, whose memory the engines hold, they are ended; on CPUs they
        idle meanwhile. Whether they still hold their CPUs."""
        if scoring_resources(self._search).gpus:
            self.close()
        return self._running is not None

    def close(self) -> None:
        """End the engines that are up, such as where something else needs their place; a race starts others."""
        if not self._running:
            return
        if self._idle:  # who broke a race off does not wait for engines at work
            self._lobby.close.remote()
            wait([self._running], timeout=PATIENCE)
        ray.kill(self._lobby)
        self._engine = self._running = None

    def _up(self, engine: EngineConfig, candidates: int) -> "Future[int]":
        """Engines that can hold what `engine` says, which run until the future ends."""
        if self._running and not _serves(self._engine, engine):
            self.close()
        if not self._running:
            require_engine(self._search)
            self._engine, self._lobby = engine, _on_this_node(Lobby).remote()
            tickets = _tickets(engine, self._search, self._lobby, candidates)
            pool = ThreadPoolExecutor(max_workers=1)
            self._running = pool.submit(lambda: sum(1 for _ in tickets.iter_rows()))
            pool.shutdown(wait=False)  # who is interrupted goes on to take the lobby away, which ends the plan
        return self._running

    def _follow(self, race: ray.ObjectRef, board: Any, running: "Future[int]") -> Iterator[Progress]:
        """Wait for the end of a race; what fails in the plan is raised here."""
        self._races += 1
        self._idle = False
        while not (progress := ray.get(board.progress.remote())).over:
            if running.done():
                running.result()
                raise RuntimeError("the engines ended before the race")
            ray.get(self._lobby.call.remote(self._races, [race]))  # again and again: a lobby that starts anew knows of none
            yield progress
            time.sleep(POLL)
        self._idle = True


@dataclass(frozen=True)
class Race:
    """What an engine needs for taking part: the work and the scoreboard that shares it out."""

    work: Work
    board: Any


class Lobby:
    """Where engines wait for the next race. Runs as a Ray actor; knows no Ray itself."""

    def __init__(self) -> None:
        self._number, self._race, self._closed = 0, None, False
        self._changed = asyncio.Condition()

    async def call(self, number: int, race: Any) -> None:
        """Call all engines to the race of this number; the first is 1."""
        async with self._changed:
            self._number, self._race = number, race
            self._changed.notify_all()

    async def close(self) -> None:
        """Let the engines go."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def wait(self, number: int) -> tuple[int, Any] | None:
        """The present race with its number, once that is above `number`; None: no further race is to come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._number > number)
            return None if self._closed else (self._number, self._race)


def _on_this_node(actor: type) -> Any:
    """Other nodes come and go; the scoreboard lives as long as the driver's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)


def _serves(up: EngineConfig | None, asked: EngineConfig) -> bool:
    """Whether an engine that is up can hold what is asked of one."""
    return (
        up is not None
        and replace(up, max_rank=asked.max_rank, target_modules=asked.target_modules) == asked
        and up.max_rank >= asked.max_rank
        and set(up.target_modules) >= set(asked.target_modules)
    )


def _tickets(engine: EngineConfig, search: SearchConfig, lobby: Any, candidates: int) -> ray.data.Dataset:
    resources = scoring_resources(search)
    batches = math.ceil(candidates / engine.adapters_per_batch)
    most = batches if search.actors == "auto" else search.actors
    jobs = [math.ceil(batches / MAX_TICKETS)] * min(batches, MAX_TICKETS) + [0] * min(MAX_TICKETS, IN_FLIGHT * most)
    return ray.data.from_arrow([pa.table({"jobs": [number]}) for number in jobs]).map_batches(
        ScoringActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT),
        fn_constructor_args=(search.engine, engine, lobby),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        runtime_env=cluster.worker_env(resources),
    )


class ScoringActor:
    """Holds one engine; called by Ray Data with a ticket."""

    patience = 600.0
    """Seconds that a batch may take beyond ten times what it should."""

    def __init__(self, engine: str, config: EngineConfig, lobby: Any):
        started = time.perf_counter()
        self.lobby, self.number, self.batch = lobby, 0, config.adapters_per_batch
        self.adapters, self.ahead = AdapterCache(ahead=2 * self.batch), set[str]()
        self.name = ray.get_runtime_context().get_actor_id()  # the same after a restart
        if not self._enter():
            raise RuntimeError("the search was broken off before this engine came to it")
        self._tell(self.board.hello, self.name)
        self.scorer: Scorer = build_scorer(engine, config)
        self.token_seconds = 0.01  # of the last batch; what a slow machine needs, until there was one
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

    def _next_job(self) -> Job | None:
        """Of this race, or where it is over of the next one; None: there is none to come."""
        while True:
            job: Job | None = self._tell(self.board.take, self.name, self.batch)
            if job or not self._enter():
                return job
            self._tell(self.board.ready, 0.0)

    def _enter(self) -> bool:
        """Wait for a race to take part in; False: none is to come."""
        if (called := self._tell(self.lobby.wait, self.number)) is None:
            return False
        self.number, [race] = called
        entered: Race = ray.get(race)
        self.work, self.board = entered.work, entered.board
        return True

    def _tell(self, method: Any, *told: Any) -> Any:
        """Call the lobby or the scoreboard. None: it is gone, as all is over."""
        try:
            return ray.get(method.remote(*told))
        except RayActorError:
            return None

    def _do(self, job: Job) -> None:
        rows = self.work.candidates.take(job.candidates)
        samples = self.work.samples.take(job.samples)
        with ExitStack() as leases:
            candidates, failures = _fetch(rows, self.adapters, leases)
            self._fetch_ahead(set(job.upcoming), set(rows["uri"].to_pylist()))
            tokens = len(candidates) * sum(len(ids) for ids in samples["input_ids"])
            scores, failed = self._watched(candidates, samples, tokens)
        record_failures(self.work.failures, failures | failed)
        names = rows["adapter_id"].to_pylist()
        self._note(names, failures | failed, len(samples))
        if len(scores):
            self.work.store.write(scores, dict(zip(names, rows["adapter_hash"].to_pylist(), strict=True)))
        nll = _by_place(scores, dict(zip(names, job.candidates, strict=True)))
        self._tell(self.board.report, self.name, nll, tokens)

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
        """Score a batch; if it fails, each of its adapters alone, so that one adapter stops no other."""
        if not candidates:
            return SCORES.empty_table(), {}
        try:
            return self.scorer.score(candidates, samples), {}
        except Exception as error:  # engines raise what they like; the reason is kept
            self._log(*(candidate.adapter_id for candidate in candidates)).warning("scoring failed", exc_info=True)
            if len(candidates) == 1:
                self._require_engine(samples)
                return SCORES.empty_table(), {candidates[0].adapter_id: _first_line(error)}
        parts = [self._score([candidate], samples) for candidate in candidates]
        failures = {name: reason for _, failed in parts for name, reason in failed.items()}
        return pa.concat_tables([table for table, _ in parts]), failures

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


def _by_place(scores: pa.Table, places: dict[str, int]) -> dict[int, list[float]]:
    """Candidate's place -> its losses, sample after sample."""
    found: dict[int, list[float]] = {}
    for name, nll in zip(scores["adapter_id"].to_pylist(), scores["nll_sum"].to_pylist(), strict=True):
        found.setdefault(places[name], []).append(nll)
    return found


def _fetch(rows: pa.Table, adapters: AdapterCache, leases: ExitStack) -> tuple[list[Candidate], dict[str, str]]:
    candidates: list[Candidate] = []
    failures: dict[str, str] = {}
    for row in rows.to_pylist():
        try:
            folder = None if row["adapter_id"] == BASE_ID else leases.enter_context(adapters.lease(row["uri"]))
            candidates.append(Candidate(row["adapter_id"], folder))
        except AdapterError as error:
            failures[row["adapter_id"]] = str(error)
    return candidates, failures


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"scoring failed: {type(error).__name__}: {lines[0]}"
