"""The race beyond this machine: its real rules, on sampled losses, with engines that are only simulated.

    python -m benchmarks.simulation [--quick] [--loading]

An event simulation of 100,000 adapters on 1 to 1,000 engines. A job of a few adapters takes the time of its adapter-samples,
times a log-normal factor; one in a hundred takes ten times as long (a straggler), in one of a thousand the engine dies and is up
again a minute later. Work that takes too long is given out again, as the scoreboard does.

With `--loading`: 10,000 adapters of a 7B base, of rank 16 and 64, on 1 to 64 GPUs. The assumptions: 300 tokens a sample at 40
microseconds, as of `benchmarks.paced`; an adapter is read at 1 GB/s while the engine scores the batch before, or when it is to
be scored, unless this engine has it in memory (16 GB an engine; the race prefers who has it); then it goes into its slot, while
the engine does nothing else, at `--swap` GB/s: 1.2 is what `benchmarks.paced` measured on a CPU, 12 what a GPU's bus may do.
Batches are as large as `adapters_per_batch: auto` makes them on a GPU, and no larger than an engine's share of what waits.

Printed for each number of engines:

    cost_share         adapter-samples used / adapters x samples
    recall_at_3        of the 3 best by their mean over all search samples
    efficiency         engine-seconds of useful work / (engines x time to finish)
    requests_needed    takes and reports a second that the scoreboard must serve
    requests_served    takes and reports a second that the rules alone can serve on this machine (one process, no Ray)
With `--loading` also:
    rank, read_ahead   of the adapters; whether they are read while the engine scores others
    loads              adapters that were read
    waited, swapped    engine-seconds in which adapters were waited for, and copied into slots / (engines x time to finish)
"""

import heapq
import itertools
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.search.engine_pool import MOST_TOGETHER, SLOT_BYTES
from pipeline.search.race import BASE, Floats, Race, fair_batch, make_schedule
from pipeline.search.scoreboard import LEASE, SLOW

N_SEARCH, N_HOLDOUT = 96, 32
PER_JOB = 4
SECONDS_A_SAMPLE = 0.05
STRAGGLERS, DEATHS = 0.01, 0.001
RESTART = 60.0
"""Seconds until an engine that died is up again."""

TOKENS, SECONDS_A_TOKEN = 300, 40e-6
BYTES_A_RANK = 5_000_000
"""Of an adapter of all linear layers of a 7B Llama, at 16 bits."""

READ = 1e9
"""Bytes a second from a disk or an object store into memory, hash and checks in it."""

MEMORY = 16e9
"""Bytes of an engine's host memory for adapters that may come back."""

NUMBERS = itertools.count()


@dataclass(frozen=True)
class Adapters:
    """How large each of them is, and how they come to an engine. The default costs nothing."""

    rank: int = 0
    read_ahead: bool = True
    swap: float = math.inf
    """Bytes a second from memory into a slot."""
    per_job: int = PER_JOB
    seconds_a_sample: float = SECONDS_A_SAMPLE

    @property
    def size(self) -> int:
        return self.rank * BYTES_A_RANK

    @classmethod
    def of_7b(cls, rank: int, read_ahead: bool, swap: float) -> "Adapters":
        fit = SLOT_BYTES // (rank * BYTES_A_RANK)
        return cls(rank, read_ahead, swap, min(fit, MOST_TOGETHER), TOKENS * SECONDS_A_TOKEN)


@dataclass
class Engine:
    """When it took up its last job, when its reader is free again, and which adapters it has in memory."""

    began: float = 0.0
    reader_free: float = 0.0
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def recency(self, candidate: int) -> int:
        return 1 if candidate in self.kept else -1

    def lacks(self, candidates: Iterable[int]) -> list[int]:
        return [one for one in candidates if one != BASE and one not in self.kept]

    def keep(self, candidates: Iterable[int], room: int) -> None:
        for one in candidates:
            self.kept[one] = None
            self.kept.move_to_end(one)
        while len(self.kept) > room:
            self.kept.popitem(last=False)


@dataclass(frozen=True, order=True)
class Event:
    """An engine reports a job (`samples`), is held to be slow with it, or is up again."""

    at: float
    number: int
    kind: str = field(compare=False)
    engine: int = field(compare=False)
    candidates: list[int] = field(compare=False, default_factory=list)
    samples: Any = field(compare=False, default=None)


@dataclass
class Ledger:
    """What a simulated search took."""

    now: float = 0.0
    useful: float = 0.0
    samples: int = 0
    jobs: int = 0
    requests: int = 0
    rules: float = 0.0
    opened: float = 0.0
    """When the open rung was opened: what is in it cannot be read before."""
    loads: int = 0
    waited: float = 0.0
    swapped: float = 0.0
    events: list[Event] = field(default_factory=list)

    def push(self, after: float, kind: str, engine: int, candidates: Sequence[int] = (), samples: Any = None) -> None:
        heapq.heappush(self.events, Event(self.now + after, next(NUMBERS), kind, engine, list(candidates), samples))


def main(
    quick: Annotated[bool, typer.Option(help="10,000 adapters, and 1 and 100 engines.")] = False,
    loading: Annotated[bool, typer.Option(help="Adapters of a 7B base, and the time that they take to load.")] = False,
    swap: Annotated[float, typer.Option(help="GB/s from memory into an engine's slot.")] = 1.2,
) -> None:
    """Simulate searches and print one JSON object for each; the last is of the most engines."""
    n, engines = (10_000, (1, 100)) if quick else (100_000, (1, 10, 100, 1_000))
    if loading:
        n, engines = 10_000, (1, 4, 16, 64)
    nll, tokens = sampled_losses(n)
    ways = [Adapters.of_7b(rank, ahead, swap * 1e9) for rank in (16, 64) for ahead in (False, True)] if loading else [Adapters()]
    for adapters, count in itertools.product(ways, engines):
        print(json.dumps(simulate(nll, tokens, count, adapters)), flush=True)


def sampled_losses(n: int) -> tuple[Floats, Any]:
    """Losses of n candidates: a skill each, a difficulty a sample that skill scales, and noise for each pair.

    A twentieth of the pool helps; most adapters of strangers do harm, some a lot.
    """
    generator = np.random.default_rng(0)
    skill = generator.gamma(2.0, 0.5, (n, 1)).astype(np.float32)
    skill[: n // 20] = -generator.gamma(2.0, 0.15, (n // 20, 1))
    generator.shuffle(skill)
    difficulty = generator.gamma(3.0, 0.6, (1, N_SEARCH + N_HOLDOUT)).astype(np.float32)
    share = generator.gamma(2.0, 0.5, difficulty.shape).astype(np.float32)
    tokens = generator.integers(2, 20, N_SEARCH + N_HOLDOUT)
    nll = difficulty + skill * share + 0.5 * generator.standard_normal((n, N_SEARCH + N_HOLDOUT), dtype=np.float32)
    nll[0] = difficulty
    return np.maximum(nll, 0.01) * tokens.astype(np.float32), tokens


def simulate(nll: Floats, tokens: Any, count: int, adapters: Adapters) -> dict[str, float]:
    """One search with so many engines."""
    n = len(nll)
    generator = np.random.default_rng(1)
    race = Race(make_schedule(n, N_SEARCH, N_HOLDOUT, 0.1), tokens.tolist(), np.full_like(nll, np.nan))
    ledger, engines = Ledger(), [Engine() for _ in range(count)]
    idle, rung = [*range(count)], 0
    while not race.over:
        while idle and _start(race, ledger, generator, idle[-1], engines, adapters):
            idle.pop()
        event = heapq.heappop(ledger.events)
        ledger.now = event.at
        if event.kind != "slow":
            idle.append(event.engine)
        started = time.perf_counter()
        if event.kind == "slow":
            race.give_back(event.candidates)
        for candidate in event.candidates if event.kind == "report" else []:
            race.report(candidate, event.samples, nll[candidate, event.samples])
        ledger.rules += time.perf_counter() - started
        ledger.requests += 1
        if race.rung > rung:
            rung, ledger.opened = race.rung, ledger.now
    return {"n_adapters": n, "engines": count, **_result(race, nll, tokens, ledger, count, adapters)}


def _start(
    race: Race, ledger: Ledger, generator: np.random.Generator, number: int, engines: Sequence[Engine], adapters: Adapters
) -> bool:
    """An idle engine asks for work. Gives whether it got some."""
    engine, started = engines[number], time.perf_counter()
    candidates, samples = race.take(fair_batch(race.waiting, len(engines), adapters.per_job))
    if adapters.size and candidates and BASE not in candidates:
        candidates = race.exchange(candidates, samples, engine.kept, engine.recency)
    ledger.rules += time.perf_counter() - started
    ledger.requests += 1
    if not candidates:
        return False
    seconds = len(candidates) * len(samples) * adapters.seconds_a_sample
    ledger.samples += len(candidates) * len(samples)
    ledger.useful += seconds
    ledger.jobs += 1
    seconds *= generator.lognormal(0, 0.2) * (10 if generator.random() < STRAGGLERS else 1)
    seconds += _load(ledger, engine, candidates, adapters)
    died = generator.random() < DEATHS
    allowed = max(LEASE, SLOW * ledger.useful / ledger.jobs)
    if died or seconds > allowed:
        ledger.push(allowed, "slow", number, candidates)
    if died:
        engine.kept.clear()
        ledger.push(RESTART, "up", number)
    else:
        ledger.push(seconds, "report", number, candidates, samples)
    return True


def _load(ledger: Ledger, engine: Engine, candidates: Sequence[int], adapters: Adapters) -> float:
    """Seconds in which an engine waits for the adapters of a job and copies them into slots."""
    if not adapters.size:
        return 0.0
    new = engine.lacks(candidates)
    begins = max(engine.began, ledger.opened, engine.reader_free) if adapters.read_ahead else ledger.now
    engine.reader_free = begins + len(new) * adapters.size / READ
    waited, swapped = max(0.0, engine.reader_free - ledger.now), len(candidates) * adapters.size / adapters.swap
    engine.began = ledger.now + waited
    engine.keep(candidates, int(MEMORY / adapters.size))
    ledger.loads += len(new)
    ledger.waited += waited
    ledger.swapped += swapped
    return waited + swapped


def _result(race: Race, nll: Floats, tokens: Any, ledger: Ledger, engines: int, adapters: Adapters) -> dict[str, float]:
    means = nll[1:, :N_SEARCH].sum(axis=1) / tokens[:N_SEARCH].sum()
    best = np.argsort(means)[:3] + 1
    up = engines * ledger.now
    loading = {
        "rank": adapters.rank,
        "read_ahead": adapters.read_ahead,
        "loads": ledger.loads,
        "waited": round(ledger.waited / up, 3),
        "swapped": round(ledger.swapped / up, 3),
    }
    return {
        "cost_share": round(ledger.samples / nll.size, 4),
        "recall_at_3": round(float((race.seen_N()[best] == N_SEARCH + N_HOLDOUT).mean()), 3),
        "hours": round(ledger.now / 3600, 3),
        "efficiency": round(ledger.useful / up, 3),
        "requests_needed": round(ledger.requests / ledger.now, 1),
        "requests_served": round(ledger.requests / ledger.rules),
        **(loading if adapters.size else {}),
    }


if __name__ == "__main__":
    typer.run(main)
