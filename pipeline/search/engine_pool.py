"""The Ray Data pipeline of the search: a stream of tickets through a pool of actors, each with one scoring engine.

A ticket is a request for one batch of work: the scoreboard picks the batch when the ticket is used, as it depends on the scores
so far. So one engine start serves the whole race, and the next one too: between two races engines wait in the lobby. Ray Data
grows and shrinks the pool with the cluster, and tries the ticket of an actor that died again when it is up once more. An actor
stores the scores of a batch, whole or not at all, before it reports them.

On a GPU vLLM's kernels add in an order that changes from call to call: a score that is made again may differ in its last bits. A
search that is taken up again keeps all scores that are stored, and ends like one that ran through, but where two adapters are
closer than that. With VLLM_BATCH_INVARIANT=1 in the driver's environment vLLM always adds in one order, and is slower.
"""

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.resources import MOST_AHEAD, Resources, describe, require, worker_env, worker_resources, workers_at_once
from pipeline.config import SearchConfig
from pipeline.core.errors import InputError
from pipeline.engines.canary import EngineFaultError
from pipeline.engines.scorer import EngineConfig, import_scorer
from pipeline.model.base_model import cpu_dtype
from pipeline.search.actor import ScoringActor
from pipeline.search.lobby import Lobby, OpenRace
from pipeline.search.race import Schedule
from pipeline.search.scoreboard import RaceProgress, Scoreboard, Work

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
    return "bfloat16" if scoring_resources(search).gpus else str(cpu_dtype()).removeprefix("torch.")


def scoring_resources(search: SearchConfig) -> Resources:
    """What one engine gets: on CPUs a whole node."""
    return worker_resources(search.cpus_per_actor, search.gpus_per_actor, spare=0)


def scoring_kind(search: SearchConfig, named: bool = True) -> str:
    """What a measured speed of scoring holds for, beside the scope of the score store; `named` as of `resources.describe`."""
    return f"scoring, {search.adapters_per_batch} adapters a batch, {describe(scoring_resources(search), named)}"


def engines_at_once(search: SearchConfig, candidates: int) -> int:
    """How many engines are asked for at once to score so many candidates, where the cluster is all ours. On one that grows, those
    that `search.actors` names; the race begins with the first that is up."""
    batches = math.ceil(candidates / search.adapters_per_batch)
    wanted, ahead = (batches, MOST_AHEAD) if search.actors == "auto" else (min(batches, search.actors), search.actors)
    return max(1, workers_at_once(scoring_resources(search), wanted, ahead, spare=0))


def require_engine(search: SearchConfig) -> None:
    """See to it that the cluster can hold an engine, and the engine compute what it is asked to.

    Raises:
        InputError: it cannot.
    """
    resources = scoring_resources(search)
    if search.engine == "vllm" and resources.gpus and scoring_dtype(search) == "float32":
        raise InputError(
            "search.dtype: float32 is not for search.engine vllm on a GPU, whose LoRA kernels compute in 16 bits; set "
            "search.dtype: auto (bfloat16 there), or search.engine: transformers"
        )
    require(resources, "search")


def score_stream(
    work: Work, engine: EngineConfig, search: SearchConfig, schedule: Schedule, seconds: float | None = None
) -> Iterator[RaceProgress]:
    """One race with engines of its own; as `Engines.race`."""
    return Engines(search).race(work, engine, schedule, seconds)


def warm_up(search: SearchConfig) -> None:
    """Let a worker import what an engine needs while something else is done: Ray starts the engine in the process that has it.

    On CPUs alone; what is imported where no GPU was given sees none later.
    """
    resources = scoring_resources(search)
    if not resources.gpus:
        ray.remote(_import_engine).options(num_cpus=0, max_retries=0, runtime_env=worker_env(resources)).remote(search.engine)


def _import_engine(engine: str) -> None:
    with suppress(RuntimeError):  # who starts it says so
        import_scorer(engine)


class Engines:
    """A pool of scoring engines: of each race its own, or `kept` up from one race to the next."""

    def __init__(self, search: SearchConfig) -> None:
        self._search = search
        self.keeping = False
        self._engine: EngineConfig | None = None
        self._lobby: Any = None
        self._running: Future[int] | None = None
        self._races = 0
        self._idle = True

    def race(self, work: Work, engine: EngineConfig, schedule: Schedule, seconds: float | None = None) -> Iterator[RaceProgress]:
        """Run the race over what has no scores yet. Yields how far it is about every second; the last says that it is over.

        Args:
            engine: what the race needs; engines that are up and can hold it serve it.
            seconds: the time that it may take, engine start apart, in place of the schedule's budget.

        Raises:
            InputError: no node of the cluster can hold an engine.
            EngineFaultError: an engine does not give the losses that plain transformers and PEFT give.
        """
        files = frozenset(work.store.files())
        board = _on_this_node(Scoreboard).remote(work, schedule, seconds)
        try:
            if not ray.get(board.progress.remote()).over:
                running = self._up(engine, len(work.candidates))
                yield from self._follow(ray.put(OpenRace(work, board, files)), board, running)
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

    @property
    def up(self) -> bool:
        """Whether there are engines, at work or idle."""
        return self._running is not None

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
        if self._running and (self._running.done() or not _serves(self._engine, engine)):
            self.close()
        if not self._running:
            require_engine(self._search)
            self._engine, self._lobby = engine, _on_this_node(Lobby).remote()
            tickets = _tickets(engine, self._search, self._lobby, candidates)
            pool = ThreadPoolExecutor(max_workers=1)
            self._running = pool.submit(lambda: sum(1 for _ in tickets.iter_rows()))
            pool.shutdown(wait=False)  # who is interrupted goes on to take the lobby away, which ends the pipeline
        return self._running

    def _follow(self, race: ray.ObjectRef, board: Any, running: "Future[int]") -> Iterator[RaceProgress]:
        """Wait for the end of a race; what fails in the pipeline is raised here."""
        self._races += 1
        self._idle = False
        while not (progress := ray.get(board.progress.remote())).over:
            if progress.fault:
                raise EngineFaultError(progress.fault)
            if running.done():
                running.result()
                raise RuntimeError("all engines ended before the race did")
            ray.get(self._lobby.call.remote(self._races, [race]))  # again and again: a lobby that starts anew knows of none
            yield progress
            time.sleep(POLL)
        self._idle = True


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
        # At least, as Ray Data lets go what goes beyond the nodes that are up; an actor that waits is what the autoscaler sees.
        compute=ActorPoolStrategy(
            min_size=engines_at_once(search, candidates), max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT
        ),
        fn_constructor_args=(search.engine, engine, lobby),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        runtime_env=worker_env(resources),
    )
