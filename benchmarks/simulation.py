"""The race beyond this machine: its real rules, on sampled losses, with engines that are only simulated.

    python -m benchmarks.simulation [--quick]

An event simulation of 100,000 adapters on 1 to 1,000 engines. A job of a few adapters takes the time of its adapter-samples,
times a log-normal factor; one in a hundred takes ten times as long (a straggler), in one of a thousand the engine dies and is up
again a minute later. Work that takes too long is given out again, as the scoreboard does. Printed for each number of engines:

    cost_share         adapter-samples used / adapters x samples
    recall_at_3        of the 3 best by their mean over all search samples
    efficiency         engine-seconds of useful work / (engines x time to finish)
    requests_needed    takes and reports a second that the scoreboard must serve
    requests_served    takes and reports a second that the rules alone can serve on this machine (one process, no Ray)
"""

import heapq
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.search.race import Floats, Race, make_schedule
from pipeline.search.scoreboard import LEASE, SLOW

N_SEARCH, N_HOLDOUT = 96, 32
PER_JOB = 4
SECONDS_A_SAMPLE = 0.05
STRAGGLERS, DEATHS = 0.01, 0.001
RESTART = 60.0
"""Seconds until an engine that died is up again."""

NUMBERS = itertools.count()


@dataclass(frozen=True, order=True)
class Event:
    """An engine reports a job (`samples`), is held to be slow with it, or is up again."""

    at: float
    number: int
    kind: str = field(compare=False)
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
    events: list[Event] = field(default_factory=list)

    def push(self, after: float, kind: str, candidates: Sequence[int] = (), samples: Any = None) -> None:
        heapq.heappush(self.events, Event(self.now + after, next(NUMBERS), kind, list(candidates), samples))


def main(quick: Annotated[bool, typer.Option(help="10,000 adapters, and 1 and 100 engines.")] = False) -> None:
    """Simulate searches and print one JSON object for each; the last is of the most engines."""
    n, engines = (10_000, (1, 100)) if quick else (100_000, (1, 10, 100, 1_000))
    nll, tokens = sampled_losses(n)
    for count in engines:
        print(json.dumps(simulate(nll, tokens, count)), flush=True)


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


def simulate(nll: Floats, tokens: Any, engines: int) -> dict[str, float]:
    """One search with so many engines."""
    n = len(nll)
    generator = np.random.default_rng(1)
    race = Race(make_schedule(n, N_SEARCH, N_HOLDOUT, 0.1), tokens.tolist(), np.full_like(nll, np.nan))
    ledger = Ledger()
    idle = engines
    while not race.over:
        while idle and _start(race, ledger, generator):
            idle -= 1
        event = heapq.heappop(ledger.events)
        ledger.now = event.at
        idle += event.kind != "slow"
        started = time.perf_counter()
        if event.kind == "slow":
            race.give_back(event.candidates)
        for candidate in event.candidates if event.kind == "report" else []:
            race.report(candidate, event.samples, nll[candidate, event.samples])
        ledger.rules += time.perf_counter() - started
        ledger.requests += 1
    return {"n_adapters": n, "engines": engines, **_result(race, nll, tokens, ledger, engines)}


def _start(race: Race, ledger: Ledger, generator: np.random.Generator) -> bool:
    """An idle engine asks for work. Gives whether it got some."""
    started = time.perf_counter()
    candidates, samples = race.take(PER_JOB)
    ledger.rules += time.perf_counter() - started
    ledger.requests += 1
    if not candidates:
        return False
    seconds = len(candidates) * len(samples) * SECONDS_A_SAMPLE
    ledger.samples += len(candidates) * len(samples)
    ledger.useful += seconds
    ledger.jobs += 1
    seconds *= generator.lognormal(0, 0.2) * (10 if generator.random() < STRAGGLERS else 1)
    died = generator.random() < DEATHS
    allowed = max(LEASE, SLOW * ledger.useful / ledger.jobs)
    if died or seconds > allowed:
        ledger.push(allowed, "slow", candidates)
    if died:
        ledger.push(RESTART, "up")
    else:
        ledger.push(seconds, "report", candidates, samples)
    return True


def _result(race: Race, nll: Floats, tokens: Any, ledger: Ledger, engines: int) -> dict[str, float]:
    means = nll[1:, :N_SEARCH].sum(axis=1) / tokens[:N_SEARCH].sum()
    best = np.argsort(means)[:3] + 1
    return {
        "cost_share": round(ledger.samples / nll.size, 4),
        "recall_at_3": round(float((race.seen_N()[best] == N_SEARCH + N_HOLDOUT).mean()), 3),
        "hours": round(ledger.now / 3600, 3),
        "efficiency": round(ledger.useful / (engines * ledger.now), 3),
        "requests_needed": round(ledger.requests / ledger.now, 1),
        "requests_served": round(ledger.requests / ledger.rules),
    }


if __name__ == "__main__":
    typer.run(main)
