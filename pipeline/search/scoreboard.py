"""The scoreboard of a race: which work is out with engines, what came back, and what goes out next. No Ray here.

A scoreboard that starts anew, as its process died, begins with what the store knows. Counts of deaths, of what is out and of
seconds are in memory alone and are lost then.
"""

import itertools
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.core.tables import CANDIDATES
from pipeline.engines.scorer import Loaded
from pipeline.search.batch import Batch, Report
from pipeline.search.race import BASE, Race, Schedule, fair_batch
from pipeline.search.score_store import ScoreStore, read_failures

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

    `candidates` is of schema CANDIDATES, in the order of scoring, the base first; `samples` is of schema SAMPLES, the search
    split before the hold-out split.
    """

    candidates: pa.Table
    samples: pa.Table
    store: ScoreStore
    failures: Folder
    stage: str = "search"
    """Of the run that asks, for the engines' logs."""
    rank_by: str = "nll"
    """As `search.rank_by`."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """adapter_id -> adapter_hash."""
        columns = (self.candidates[name].to_pylist() for name in ("adapter_id", "adapter_hash"))
        return dict(zip(*columns, strict=True))


@dataclass
class RaceProgress:
    """How far a search is. `seconds` are those that all engines together spent scoring, and `waited` those in which they had to
    wait for adapters; `loaded` are the adapters that they read meanwhile; `warm_seconds` and `warm_tokens` are from each engine's
    second batch of adapters on: with its first one an engine compiles kernels."""

    adapter_samples: int = 0
    """Scores that were made and are in the store."""
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
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
    fault: Exception | None = None
    """Why an engine cannot be believed or cannot serve the base, and so no score can be had."""

    @property
    def over(self) -> bool:
        return self.seen is not None


@dataclass
class _Lease:
    """Candidates that are out with an engine, by their rows in `Work`, and the rows of the samples."""

    candidates: list[int]
    samples: list[int]
    alone: bool
    started: float = field(default_factory=time.monotonic)
    engine: str | None = None
    """Who has begun with it."""
    given_back: bool = False


class HeldBy:
    """Which engine scored an adapter last, and so has it in memory or on its disk."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, int]] = {}
        self._adapters: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._time = itertools.count()

    def note(self, engine: str, adapters: Iterable[str]) -> None:
        """An engine begins to score adapters, by their hashes."""
        now = engine, next(self._time)
        for one in adapters:
            self._adapters[self._last.get(one, now)[0]].pop(one, None)
            self._adapters[engine][one] = None
            self._last[one] = now

    def adapters(self, engine: str) -> list[str]:
        """Those that this engine scored last, by their hashes."""
        return [*self._adapters[engine]]

    def recency(self, engine: str, adapter: str) -> int:
        """The larger, the more recently this engine has begun to score the adapter; -1: another did later, or nobody."""
        last, time = self._last.get(adapter, ("", -1))
        return time if last == engine else -1


def ranked_by(measure: str, scores: pa.Table) -> list[float]:
    """What a race adds up, of a table of schema SCORES; as `score_store.Known.ranked_by`.

    Raises:
        InputError: the engine does not tell which tokens were the model's first choice.
    """
    if measure == "nll":
        return list(scores["nll_sum"].to_pylist())
    if scores["n_correct"].null_count:
        raise InputError(
            "search.rank_by token_accuracy: this engine does not tell which tokens were the model's first choice; set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment, or search.engine: transformers"
        )
    columns = (scores[name].to_numpy(zero_copy_only=False) for name in ("nll_sum", "n_tokens", "n_correct"))
    nll_M, tokens_M, hits_M = columns
    return [float(missed) for missed in np.where(np.isfinite(nll_M), tokens_M - hits_M, np.inf)]


class Scoreboard:
    """Of one race."""

    def __init__(
        self,
        work: Work,
        schedule: Schedule,
        seconds: float | None = None,
        number: int = 1,
        held: HeldBy | None = None,
    ) -> None:
        """
        Args:
            seconds: the time that the race may take, from the first engine that is up.
            number: of the race.
            held: shared by races that the same engines serve.
        """
        self.work, self.number = work, number
        self._held = held or HeldBy()
        self._hashes: list[str] = work.candidates["adapter_hash"].to_pylist()
        known = work.store.load(self._hashes, work.samples)
        self._tell = RaceProgress(rungs=len(schedule.rungs))
        self._limit = math.inf if seconds is None else seconds
        self._deadline = self._first_rung_ends = math.inf
        self._out: dict[str, _Lease] = {}
        self._deaths: Counter[int] = Counter()
        self._reports = self._scored = 0
        self._told_stopped: Counter[str] = Counter()
        left = self._affordable if seconds else None
        self.race = Race(schedule, known.tokens_S.tolist(), known.ranked_by(work.rank_by).astype(np.float32), left)
        names = work.candidates["adapter_id"].to_pylist()
        self._row_of = {name: row for row, name in enumerate(names)}
        self._rows_of_hash: dict[str, list[int]] = {}
        for row, one in enumerate(self._hashes):
            self._rows_of_hash.setdefault(one, []).append(row)
        self._sample_of = {name: row for row, name in enumerate(work.samples["sample_id"].to_pylist())}
        for name in read_failures(work.failures).keys() & self._row_of.keys():
            self.race.set_aside(self._row_of[name])

    @property
    def is_over(self) -> bool:
        return self.race.over or bool(self.race.aside_N[BASE])

    @property
    def batches_out(self) -> int:
        """Batches that are with engines, or on the way to one."""
        return sum(not lease.given_back for lease in self._out.values())

    @property
    def at_work(self) -> set[str | None]:
        """Engines that have begun a batch and not reported it."""
        return {lease.engine for lease in self._out.values()}

    def engine_up(self, engines: int, startup: float) -> None:
        """So many engines have come up by now; the last one took so many seconds to start."""
        if not self._tell.engines:
            now = time.monotonic()
            self._deadline, self._first_rung_ends = now + self._limit, now + FIRST_RUNG_SHARE * self._limit
        self._tell.engines = engines
        self._tell.startup += startup

    def next_batch(self, count: int) -> Batch | None:
        """Work for an engine, up to `count` adapters, and no more than its share; None: there is none at present."""
        if self.is_over:
            return None
        if time.monotonic() > self._first_rung_ends:
            self._tell.not_reached += len(self.race.drop_pending())
        head = self.race.head()
        # What an engine died of is found by trying one at a time; the base keeps to itself.
        suspect = head is not None and self._deaths[head] > 0
        fair = fair_batch(self.race.waiting, self._tell.engines, count)
        candidates, samples = self.race.take(1 if suspect or head == BASE else fair)
        if not candidates:
            return None
        number = uuid.uuid4().hex
        self._out[number] = _Lease(candidates, samples.tolist(), suspect)
        rows, columns = pa.array(candidates, pa.int64()), pa.array(samples, pa.int64())
        adapters, asked = self.work.candidates.take(rows), self.work.samples.take(columns)
        return Batch(self.number, number, self.work.stage, suspect, adapters, asked)

    def begin(self, engine: str, number: str) -> tuple[pa.Table, dict[str, str]]:
        """An engine begins a batch. One that begins a second time had died with the first engine: it is given out again, an
        adapter at a time.

        Returns:
            Of schema CANDIDATES, those whom it is to score: those of the batch that lack scores, or others in place of some,
            which it has scored before and so need not fetch. And adapter_id -> reason of those that are set aside by now.
        """
        lease = self._out.get(number)
        if lease is None:  # of a scoreboard that died; the work is given out again
            return CANDIDATES.empty_table(), {}
        if lease.engine:
            del self._out[number]
            return CANDIDATES.empty_table(), self._blame(lease)
        lease.engine, lease.started = engine, time.monotonic()
        # What was taken back meanwhile is others' by now, and none of it may count as this engine's.
        if not (lease.alone or lease.given_back or BASE in lease.candidates):
            recency = lambda row: self._held.recency(engine, self._hashes[row])  # noqa: E731
            held = (row for one in self._held.adapters(engine) for row in self._rows_of_hash.get(one, ()))
            lease.candidates = self.race.exchange(lease.candidates, np.array(lease.samples, np.int64), held, recency)
        self._drop_late(lease)
        rows = [row for row in lease.candidates if self._lacks(row, lease.samples)]
        if not rows:
            self._end(self._out.pop(number))
        wanted = self.work.candidates.take(pa.array(rows, pa.int64()))
        self._held.note(engine, [self._hashes[row] for row in rows])
        return wanted, {}

    def stopped(self, engine: str) -> list[str]:
        """URIs of the adapters that will not be scored again in this race, of which this engine has not been told yet."""
        new = self.race.stopped[self._told_stopped[engine] :]
        self._told_stopped[engine] += len(new)
        uris = self.work.candidates["uri"]
        return [uri for row in new if (uri := uris[row].as_py())]

    def racing(self) -> set[str | None]:
        """URIs of those who may be scored again in this race."""
        return set(self.work.candidates["uri"].take(pa.array(self.race.racing())).to_pylist())

    def report(self, report: Report) -> None:
        """What became of a batch. Scores count whoever gave the work out."""
        told, lease = self._tell, self._out.pop(report.number, None)
        self._reports += 1
        self._scored += len(report.scores)
        told.seconds += report.seconds
        told.waited += report.waited
        told.loaded.add(report.loaded)
        told.tokens += report.tokens
        if report.warm:
            told.warm_tokens += report.tokens
            told.warm_seconds += report.seconds
        held = lease is not None and not lease.given_back  # else others may have the same candidates by now
        rows = [[self._row_of[name]] for name in report.scores["adapter_id"].to_pylist()]
        self._take_in(rows, report.scores, self.race.report if held else self.race.learn)
        for name in report.failures:
            self.race.set_aside(self._row_of[name])
        if lease:
            self._end(lease)

    def learn(self, scores: pa.Table) -> None:
        """Scores of schema STORED that another run has made of candidates of this one; without what the race ranks by they do
        not count."""
        if self.work.rank_by != "nll":
            scores = scores.filter(pc.is_valid(scores["n_correct"]))
        rows = [self._rows_of_hash.get(one, []) for one in scores["adapter_hash"].to_pylist()]
        self._take_in(rows, scores, self.race.learn)

    def reclaim(self) -> None:
        """Take back what somebody has had for too long. What is reported twice counts as it was reported last."""
        allowed = max(LEASE, SLOW * self._tell.seconds / max(1, self._reports))
        for lease in self._out.values():
            if time.monotonic() - lease.started > allowed:
                self._end(lease)

    def progress(self) -> RaceProgress:
        race = self.race
        self._tell.rung = min(race.rung + 1, self._tell.rungs)
        self._tell.outstanding, self._tell.entrants = race.outstanding, race.entrants
        if self.is_over:
            self._tell.seen = np.where(race.aside_N, 0, race.seen_N()).tolist()
        return self._tell

    def _take_in(self, rows: Sequence[Sequence[int]], scores: pa.Table, tell: Callable[..., None]) -> None:
        """Tell the race the scores of a table by one of its methods; `rows`: whose each is."""
        found: dict[int, dict[int, float]] = {}
        columns = [self._sample_of[sample] for sample in scores["sample_id"].to_pylist()]
        for owners, column, value in zip(rows, columns, ranked_by(self.work.rank_by, scores), strict=True):
            for row in owners:
                found.setdefault(row, {})[column] = value
        for row, value_of in found.items():
            self._deaths.pop(row, None)  # it was not this one
            tell(row, np.array(list(value_of), np.int64), list(value_of.values()))

    def _end(self, lease: _Lease) -> None:
        """Nobody is waited for any more; what lacks scores goes out again."""
        if not lease.given_back:
            self.race.give_back(lease.candidates)
        lease.given_back = True

    def _drop_late(self, lease: _Lease) -> None:
        """Leave out who is to be scored for the first time, where the time for that is over."""
        if self.race.rung == 0 and time.monotonic() > self._first_rung_ends:
            late = [row for row in lease.candidates if row != BASE and self._lacks(row, lease.samples)]
            self._tell.not_reached += len(late)
            for row in late:
                self.race.set_aside(row)

    def _lacks(self, row: int, samples: Sequence[int]) -> bool:
        return not self.race.aside_N[row] and bool(np.isnan(self.race.nll_NS[row, samples]).any())

    def _blame(self, lease: _Lease) -> dict[str, str]:
        """Give back what an engine died with. Whether it died of that is seen where it is scored alone: an adapter with which
        engines die again and again is set aside."""
        for row in lease.candidates:
            self._deaths[row] = self._deaths[row] + 1 if lease.alone else max(1, self._deaths[row])
        self._end(lease)
        deadly = [row for row in lease.candidates if self._deaths[row] >= MAX_DEATHS]
        for row in deadly:
            self.race.set_aside(row)
        reason = f"the engine died, or hung, {MAX_DEATHS} times with this adapter"
        return {self.work.candidates["adapter_id"][row].as_py(): reason for row in deadly}

    def _affordable(self) -> float:
        """Adapter-samples that all engines can still score before the deadline, at the speed so far."""
        speed = self._tell.engines * self._scored / max(self._tell.seconds + self._tell.waited, 1e-9)
        return max(0.0, self._deadline - time.monotonic()) * speed
