"""The engines of a search, and the stream that feeds them: races -> batches of work -> a pool of engines -> scores.

    dispatcher          the actor in which the race is run (`dispatcher.py`, with the rules of `race.py`)
    -> BatchSource      a Ray Data source that asks it for the next batch: which adapters, and the samples' token ids
    -> ScoringActor     a pool of actors, each with one engine, over which Ray Data shares the batches out (`actor.py`)
    -> dispatcher       takes the scores in, writes them behind the race, and opens the next rung

Engines that stay up from one race to the next, as from the search to the merge, are a stream that has not ended. Ray Data grows
the pool with the cluster, and gives the batch of an actor that died to it again when it is up once more. Scores go to the
dispatcher by a call, as through Ray Data's own loop they would come some 0.3 s later, at the end of each rung.

On a GPU vLLM's kernels add in an order that changes from call to call: a score that is made again may differ in its last bits. A
search that is taken up again keeps all scores that are stored, and ends like one that ran through, but where two adapters are
closer than that. With VLLM_BATCH_INVARIANT=1 in the driver's environment vLLM always adds in one order, and is slower.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.data.context import AutoscalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.resources import MOST_AHEAD, Resources, describe, require, worker_env, worker_resources, workers_at_once
from pipeline.config import SearchConfig
from pipeline.core.errors import InputError
from pipeline.engines.scorer import EngineConfig
from pipeline.model.base_model import cpu_dtype, fast_dtype, linear_shapes
from pipeline.search.actor import ScoringActor
from pipeline.search.batch_source import BatchSource
from pipeline.search.dispatcher import IN_FLIGHT, Dispatcher
from pipeline.search.race import Schedule
from pipeline.search.scoreboard import RaceProgress, Work

POLL = 1.0
"""Seconds between two looks at how far a race is."""

TOGETHER, MOST_TOGETHER, SLOT_BYTES = 4, 32, 4 << 30
"""Adapters that an engine scores together: at least, and on GPUs at most, where their slots take so many bytes of its memory."""

GROW_AT, NEVER = 0.9, -1.0
"""Batches at hand for each that an actor can have, at which Ray Data adds actors, and at which it lets some go."""

PATIENCE = 20.0
"""Seconds that engines which are let go may take for it."""


def engine_config(base: str, max_rank: int, target_modules: Iterable[str], search: SearchConfig, max_tokens: int) -> EngineConfig:
    """The engine that holds adapters up to `max_rank` on these modules."""
    resources, modules = scoring_resources(search), tuple(sorted(target_modules))
    together = search.adapters_per_batch
    if together == "auto":
        fit = SLOT_BYTES // max(1, slot_bytes(base, max_rank, modules, scoring_dtype(search))) if resources.gpus else 0
        together = min(max(fit, TOGETHER), MOST_TOGETHER)
    return EngineConfig(
        base=base,
        dtype=scoring_dtype(search),
        max_rank=max_rank,
        target_modules=modules,
        max_tokens=max_tokens,
        adapters_per_batch=int(together),
        tensor_parallel_size=max(1, resources.gpus),
        kept_bytes=_bytes(search.memory_cache_gb),
        disk_bytes=_bytes(search.disk_cache_gb),
    )


def _bytes(gigabytes: float | str) -> int | None:
    return None if isinstance(gigabytes, str) else round(gigabytes * 1e9)


def slot_bytes(base: str, rank: int, target_modules: Collection[str], dtype: str) -> int:
    """What room for one adapter of this rank takes, on every layer whose name ends in one of these."""
    shapes = linear_shapes(base)[0].items()
    features = sum(sum(shape) for module, shape in shapes if module.rpartition(".")[2] in target_modules)
    return features * rank * fast_dtype(dtype).itemsize


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
    together = TOGETHER if search.adapters_per_batch == "auto" else search.adapters_per_batch
    batches = math.ceil(candidates / together)
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


Asked = tuple[Work, Schedule, float | None]
"""A race: what it scores, by which schedule, and the seconds that it may take, engine start apart, in place of the schedule's
budget."""


class Engines:
    """A pool of scoring engines: of each race its own, or `kept` up from one race to the next."""

    def __init__(self, search: SearchConfig) -> None:
        self._search = search
        self.keeping = False
        self.expected = 0
        """Candidates of the largest race to come: engines are started for so many."""
        self._engine: EngineConfig | None = None
        self._dispatcher: Any = None
        self._running: Future[int] | None = None
        self._races = 0
        self._idle = True

    def race(self, work: Work, engine: EngineConfig, schedule: Schedule, seconds: float | None = None) -> Iterator[RaceProgress]:
        """One race; as `races`."""
        for (progress,) in self.races([(work, schedule, seconds)], engine):
            yield progress

    def races(self, asked: Sequence[Asked], engine: EngineConfig) -> Iterator[list[RaceProgress]]:
        """Run races side by side over what has no scores yet. Yields how far each is about every second; the last time all are
        over.

        Args:
            engine: what the races need; engines that are up and can hold it serve them.

        Raises:
            InputError: no node of the cluster can hold an engine, or the engine cannot serve the base.
            EngineFaultError: an engine does not give the losses that plain transformers and PEFT give.
        """
        if self._running and (self._running.done() or not (self._engine and self._engine.serves(engine))):
            self.close()
        self._dispatcher = self._dispatcher or _on_this_node(Dispatcher).remote()
        opened = {self._races + n: ray.put((*one, engine.adapters_per_batch)) for n, one in enumerate(asked, 1)}
        self._races += len(opened)
        try:
            self._open(opened)
            progress = self._progress(opened)
            while not all(one.over for one in progress):
                self._require_engines(engine, max(self.expected, *(len(one[0].candidates) for one in asked)))
                yield progress
                progress = self._progress(opened)
            yield progress
        finally:
            if not self.keeping:
                self.close()

    def begin(self, engine: EngineConfig, work: Work) -> None:
        """Start an engine before there is a race for it, alone on this machine: Ray is not told of its CPUs, else nothing else
        could work meanwhile. What goes wrong with it the first race is told.

        Args:
            work: with samples that it is to prove itself on, and no candidates.
        """
        self._dispatcher = self._dispatcher or _on_this_node(Dispatcher).remote()
        self._dispatcher.expect.remote(work)  # not waited for, as its process may only just start: engines ask for it
        self._run(engine, _stream(engine, self._search, self._dispatcher, 1, alone=True))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within, the engines that a race started stay up for the next one; who kept them before keeps them still."""
        before, self.keeping = self.keeping, True
        try:
            yield
        except BaseException:
            self._idle = False  # who has failed does not wait for an engine to start or to end
            raise
        finally:
            self.keeping = before
            if not before:
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
        return self.up

    def close(self) -> None:
        """End the engines that are up, such as where something else needs their place; a race starts others."""
        if not self._dispatcher:
            return
        with suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
            ray.get(self._dispatcher.close.remote(), timeout=PATIENCE)  # what a race that is broken off has scored is kept
        if self._running and self._idle:  # who broke a race off does not wait for engines at work
            wait([self._running], timeout=PATIENCE)
        ray.kill(self._dispatcher)
        self._engine = self._running = self._dispatcher = None

    def _open(self, opened: dict[int, ray.ObjectRef]) -> None:
        self._idle = False
        ray.get(self._dispatcher.open.remote([*opened], *opened.values()))

    def _progress(self, opened: dict[int, ray.ObjectRef]) -> list[RaceProgress]:
        """How far races are, once POLL has passed or they are over.

        Raises:
            EngineFaultError: an engine cannot be believed.
            InputError: it cannot serve the base.
        """
        progress: list[RaceProgress | None]
        asked = [*opened], POLL if self._running else 0.0
        while None in (progress := ray.get(self._dispatcher.progress.remote(*asked))):
            self._open(opened)  # the dispatcher's process died, and the new one knows of no race
        found = [one for one in progress if one]
        if fault := found[0].fault:
            raise fault
        self._idle = all(one.over for one in found)
        return found

    def _require_engines(self, engine: EngineConfig, candidates: int) -> None:
        """See to it that there are engines, which run until `_running` ends; what fails in their stream is raised here."""
        if not self._running:
            require_engine(self._search)
            self._run(engine, _stream(engine, self._search, self._dispatcher, candidates))
        elif self._running.done():
            self._running.result()
            raise RuntimeError("all engines ended before the race did")

    def _run(self, engine: EngineConfig, stream: ray.data.Dataset) -> None:
        pool = ThreadPoolExecutor(max_workers=1)
        self._engine, self._running = engine, pool.submit(_drain, stream)
        pool.shutdown(wait=False)  # who is interrupted goes on to take the dispatcher away, which ends the stream


def _drain(stream: ray.data.Dataset) -> int:
    """Let a stream flow to its end. Gives how many batches there were."""
    return sum(1 for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))


def _stream(
    engine: EngineConfig, search: SearchConfig, dispatcher: Any, candidates: int, alone: bool = False
) -> ray.data.Dataset:
    """Batches of work through a pool of engines, for so many candidates. `alone`: as of `Engines.begin`."""
    resources = scoring_resources(search)
    most = math.ceil(candidates / engine.adapters_per_batch) if search.actors == "auto" else search.actors
    # At least, as Ray Data lets go what goes beyond the nodes that are up; an actor that waits is what the autoscaler sees.
    least = engines_at_once(search, candidates)
    with warnings.catch_warnings():  # its new parameters know neither a node nor retries
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        batches = ray.data.read_datasource(
            BatchSource(dispatcher), override_num_blocks=1, ray_remote_args=_here() | {"max_retries": 0}
        )
    scored = batches.map_batches(
        ScoringActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=least,
            max_size=least if alone else max(least, most),
            max_tasks_in_flight_per_actor=IN_FLIGHT,
            max_concurrent_calls_per_actor=IN_FLIGHT,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(search.engine, engine, dispatcher, None if resources.gpus else resources.cpus),
        num_cpus=0 if alone else resources.cpus,
        num_gpus=resources.gpus,
        runtime_env=worker_env(resources),
    )
    scored.context.target_max_block_size = 1  # a batch flows on as soon as it is there
    scored.context.execution_no_progress_timeout_s = -1  # between two races there is none
    scored.context.autoscaling_config = AutoscalingConfig(GROW_AT, NEVER)  # an engine that has nothing to do has a next rung
    return scored


def _here() -> dict[str, Any]:
    """Other nodes come and go; what a search is steered by lives as long as the driver."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _on_this_node(actor: type) -> Any:
    return ray.remote(actor).options(**_here(), max_restarts=-1, max_task_retries=-1)
