"""The scoreboard of a search: an actor that knows the race, hands out work to the engines and takes their scores in.

Engines store scores before they report them, and a scoreboard that starts anew begins with what the store knows. Counts of
deaths, leases and times are in memory alone and are lost then.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.core.storage import Folder
from pipeline.engines.scorer import Loaded
from pipeline.search.race import BASE, Race, Schedule
from pipeline.search.score_store import ScoreStore, read_failures, record_failures

MAX_DEATHS = 3
"""Engines that may die with an adapter in their hands before it is set aside."""

LEASE, SLOW = 10.0, 5
"""Work that takes longer than this many seconds, and this many times the mean, goes to another engine too, once there is
nothing else to do: at the end of a rung all would wait for a slow one."""

FIRST_RUNG_SHARE = 0.5
"""Share of a budget in seconds that the first rung may use."""


@dataclass(frozen=True)
class Work:
    """What a search scores.

    `candidates` has the columns adapter_id, uri and adapter_hash, in the order of scoring, the base (uri null) first;
    `samples` is of schema SAMPLES, the search split before the hold-out split.
    """

    candidates: pa.Table
    samples: pa.Table
    store: ScoreStore
    failures: Folder
    stage: str = "search"
    """Of the run that asks, for the engines' logs."""


@dataclass(frozen=True)
class ScoringJob:
    """Candidates to be scored on samples, by their rows in the tables of `Work`; `upcoming`: adapters that follow."""

    candidates: list[int]
    samples: list[int]
    upcoming: list[str]


@dataclass
class RaceProgress:
    """How far a search is. `seconds` are those of all engines together, their start apart; `loaded` are the adapters that they
    read in these; `warm_seconds` are the others from each engine's second batch of adapters on, for `warm_tokens`: with its first
    one an engine compiles kernels."""

    adapter_samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    warm_tokens: int = 0
    warm_seconds: float = 0.0
    loaded: Loaded = field(default_factory=Loaded)
    engines: int = 0
    startup: float = 0.0
    rung: int = 0
    rungs: int = 0
    outstanding: int = 0
    entrants: int = 0
    not_reached: int = 0
    seen: list[int] | None = None
    """Samples that count for each candidate, once the race is over; 0: it was set aside, or there was no time for it."""
    fault: str | None = None
    """Why an engine cannot be believed, and so no score can be had."""

    @property
    def over(self) -> bool:
        return self.seen is not None


@dataclass
class _Lease:
    job: ScoringJob
    started: float = field(default_factory=time.monotonic)
    given_back: bool = False


class Scoreboard:
    """Runs as a Ray actor; knows no Ray itself."""

    def __init__(self, work: Work, schedule: Schedule, seconds: float | None = None) -> None:
        self.work = work
        known = work.store.load(work.candidates["adapter_hash"].to_pylist(), work.samples)
        self._tell = RaceProgress(rungs=len(schedule.rungs))
        self._limit = math.inf if seconds is None else seconds
        self._deadline = self._first_rung_ends = math.inf  # the time runs from the first engine that is up
        self._held: dict[str, _Lease] = {}
        self._deaths: Counter[int] = Counter()
        self._jobs = 0
        self._changed = asyncio.Condition()
        left = self._affordable if seconds else None
        self.race = Race(schedule, known.tokens_S.tolist(), known.nll_NS.astype(np.float32), left)
        rows = {name: row for row, name in enumerate(work.candidates["adapter_id"].to_pylist())}
        for name in read_failures(work.failures):
            if name in rows:
                self.race.set_aside(rows[name])

    async def hello(self, engine: str) -> None:
        """An engine's process begins. What an earlier process of the same engine held is lost: it is given out again."""
        async with self._changed:
            if engine in self._held:
                lease = self._held.pop(engine)
                self._deaths.update(lease.job.candidates)
                self._give_back(lease)
                self._changed.notify_all()

    def ready(self, startup: float) -> None:
        """An engine is up; it took so many seconds."""
        if not self._tell.engines:
            now = time.monotonic()
            self._deadline, self._first_rung_ends = now + self._limit, now + FIRST_RUNG_SHARE * self._limit
        self._tell.engines += 1
        self._tell.startup += startup

    def refuse(self, fault: str) -> None:
        """An engine has not proved itself; it says why."""
        self._tell.fault = fault

    async def take(self, engine: str, count: int) -> ScoringJob | None:
        """The next work for an engine, up to `count` adapters; waits where there is none yet. None: the race is over."""
        async with self._changed:
            while not (self.race.over or self.race.aside_N[BASE]):
                if job := self._next(count):
                    self._held[engine] = _Lease(job)
                    return job
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=1.0)
                except TimeoutError:
                    self._reclaim()
            self._changed.notify_all()
        return None

    async def report(
        self,
        engine: str,
        nll: dict[int, Sequence[float]],
        tokens: int,
        found: int = 0,
        loaded: Loaded | None = None,
        warm: bool = True,
    ) -> None:
        """The scores of a job, in the order of its samples; a candidate without any is set aside.

        Args:
            tokens: input tokens that the engine read for them.
            found: candidates whose scores it found in the store.
            loaded: adapters that it read for them.
            warm: whether it had scored a batch of adapters before.
        """
        async with self._changed:
            lease = self._held.pop(engine, None)
            if lease is None:  # this process took a dead one's place, and gives the work out again if it is not in the store
                return
            seconds = time.monotonic() - lease.started
            self._jobs += 1
            self._tell.seconds += seconds
            loaded = loaded or Loaded()
            self._tell.loaded.add(loaded)
            if warm:
                self._tell.warm_tokens += tokens
                self._tell.warm_seconds += max(0.0, seconds - loaded.seconds)
            self._tell.tokens += tokens
            self._tell.adapter_samples += (len(nll) - found) * len(lease.job.samples)
            for candidate in lease.job.candidates:
                if candidate in nll:
                    self.race.report(candidate, np.array(lease.job.samples), nll[candidate])
                else:
                    self.race.set_aside(candidate)
            self._changed.notify_all()

    def progress(self) -> RaceProgress:
        race = self.race
        self._tell.rung = min(race.rung + 1, self._tell.rungs)
        self._tell.outstanding, self._tell.entrants = race.outstanding, race.entrants
        if race.over or race.aside_N[BASE]:
            self._tell.seen = np.where(race.aside_N, 0, race.seen_N()).tolist()
        return self._tell

    def _next(self, count: int) -> ScoringJob | None:
        if time.monotonic() > self._first_rung_ends:
            self._tell.not_reached += len(self.race.drop_pending())
        while head := self.race.upcoming(1):
            if self._deaths[head[0]] < MAX_DEATHS:
                break
            name = self.work.candidates["adapter_id"][head[0]].as_py()
            record_failures(
                self.work.failures, {name: f"the engine died, or hung, {MAX_DEATHS} times while it scored this adapter"}
            )
            self.race.set_aside(head[0])
        # What an engine died of is found by trying one at a time; the base keeps to itself.
        alone = head and (self._deaths[head[0]] or head[0] == BASE)
        candidates, samples = self.race.take(1 if alone else count)
        if not candidates:
            return None
        upcoming = self.work.candidates["uri"].take(pa.array(self.race.upcoming(count), pa.int64())).to_pylist()
        return ScoringJob(candidates, samples.tolist(), [uri for uri in upcoming if uri])

    def _reclaim(self) -> None:
        """Take back what somebody has held for too long; whoever reports first counts."""
        allowed = max(LEASE, SLOW * self._tell.seconds / max(1, self._jobs))
        for lease in self._held.values():
            if time.monotonic() - lease.started > allowed:
                self._give_back(lease)

    def _give_back(self, lease: _Lease) -> None:
        if not lease.given_back:  # else its candidates may be with another engine by now
            self.race.give_back(lease.job.candidates)
            lease.given_back = True

    def _affordable(self) -> float:
        """Adapter-samples that all engines can still score before the deadline, at the speed so far."""
        speed = self._tell.engines * self._tell.adapter_samples / max(self._tell.seconds, 1e-9)
        return max(0.0, self._deadline - time.monotonic()) * speed
