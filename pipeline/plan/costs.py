"""The arithmetic of a plan: how much there is to score and to train, how long that takes, and how far an estimate was off.

Plain functions over numbers and arrays; they call no Ray and open no files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cluster.resources import Resources
from pipeline.config import TrainConfig
from pipeline.search.race import BASE, Indices, Race
from pipeline.train.batches import padded_tokens, row_numbers

Seconds = float | None
"""None: nobody measured what it takes to say."""


@dataclass(frozen=True)
class Scoring:
    """Input tokens that are to be scored by engines side by side, and the bytes of the adapters that they read for it; the race
    ends after `limit` seconds."""

    tokens: int
    engines: int
    limit: float = math.inf
    load_bytes: float = 0.0


@dataclass(frozen=True)
class Training:
    """Arms that are to be trained, `at_once` side by side, with the tokens of one arm; and those of the test at the end, which
    `tested` arms take, with the rows that a metric of the user's is measured on. Of a hedge, half of the arms end after the share
    `decided_after` of their steps."""

    arms: int
    at_once: int
    tokens: float
    evaluation_tokens: int
    test_tokens: int
    tested: int = 0
    metric_rows: int = 0
    decided_after: float = 1.0

    @property
    def arms_worth(self) -> float:
        """Whole arms that would train as many tokens."""
        return self.arms * (1 + self.decided_after) / 2


def left_to_score(race: Race) -> int:
    """Adapter-samples that a race asks for at most: what its open rung lacks, and what the budget leaves to those after it."""
    if race.over:
        return 0
    end, n_samples = race.schedule.rungs[race.rung], race.schedule.rungs[-1]
    unknown = np.isnan(race.nll_NS[(race.rungs_N == race.rung + 1) & ~race.aside_N])
    now, later = int(unknown[:, :end].sum()), int(unknown[:, end:].sum())
    if race.schedule.budget is None:
        return now + later
    finalists = (race.schedule.keep + 1) * (n_samples - end)  # the base is one more; they go on whatever the budget
    return now + min(later, max(int(race.schedule.budget - race.seen_N().sum()), finalists))


def arm_tokens(lengths: Indices, train: TrainConfig, seed: int, tokens: int) -> int:
    """Input tokens, padding included, that an arm of this seed trains on.

    Args:
        lengths: tokens of each training row.
        tokens: most in one pass.
    """
    steps = lengths[row_numbers(0, train.steps, train.batch_size, len(lengths), seed)].reshape(-1, train.batch_size)
    return sum(padded_tokens(batch, train.workers, tokens) for batch in steps.tolist())


def loads_at_most(race: Race) -> int:
    """How often an adapter is read for a race at most: once for each rung that it is scored in, as another engine may have it by
    then."""
    if race.over:
        return 0
    lacking_N = np.isnan(race.nll_NS[:, : race.schedule.rungs[race.rung]]).sum(axis=1)
    lacking_N[(race.rungs_N <= race.rung) | race.aside_N] = 0
    later, steps = left_to_score(race) - int(lacking_N.sum()), np.diff(race.schedule.rungs[race.rung :])
    lacking_N[BASE] = 0  # which is no adapter
    return int(np.count_nonzero(lacking_N)) + (later // int(steps.min()) if len(steps) else 0)


def knows_scoring(rates: Mapping[str, float]) -> bool:
    """Whether these rates say how long scoring takes."""
    return "tokens_per_second" in rates


def scoring_seconds(work: Scoring, rates: Mapping[str, float]) -> Seconds:
    """Engine start, and scoring or reading adapters, whichever takes longer, as an engine does both at a time; nothing is started
    where nothing is to be scored."""
    if not work.tokens:
        return 0.0
    if not knows_scoring(rates):
        return None
    working = max(work.tokens / rates["tokens_per_second"], work.load_bytes * rates.get("load_seconds_per_byte", 0.0))
    return rates.get("start_seconds", 0.0) + min(work.limit, working / work.engines)


def training_seconds(work: Training, rates: Mapping[str, float]) -> Seconds:
    """Arms side by side, each with its start, steps and evaluations, and then the test. Where not all arms of a hedge have a
    place at once, those that go on start a second time."""
    if not work.arms:
        return 0.0
    if not rates:
        return None
    evaluated = rates["evaluation_tokens_per_second"]
    start, arm = rates["start_seconds"], work.tokens / rates["tokens_per_second"] + work.evaluation_tokens / evaluated
    all_arms, going_on = math.ceil(work.arms / work.at_once), math.ceil(work.arms / 2 / work.at_once)
    first, rest = work.decided_after, 1 - work.decided_after
    starts = all_arms + (going_on if rest and all_arms > 1 else 0)
    return starts * start + (first * all_arms + rest * going_on) * arm + work.test_tokens / evaluated


def measuring_seconds(work: Training, rates: Mapping[str, float]) -> float:
    """Measuring a metric of the user's, as far as earlier runs did."""
    return work.tested * work.metric_rows * rates.get("seconds_per_row", 0.0)


def training_rates(outcome: Mapping[str, Any], evaluation_tokens: int) -> dict[str, float]:
    """What an arm measured, and the size of its passes in the end; empty where it diverged, was stopped, or was gone on with, so
    that its parts are not those of one attempt.

    Args:
        outcome: what `ray_train.fit` returns.
        evaluation_tokens: of one evaluation.
    """
    curve, evaluating = outcome["curve"], outcome["evaluation_seconds"]
    start = outcome["fit_seconds"] - curve[-1]["seconds"] - evaluating - outcome.get("held_seconds", 0.0)
    if outcome["diverged_at"] is not None or "stopped_at" in outcome or start < 0:
        return {}
    first = curve[1] if len(curve) > 2 else curve[0]  # the first steps warm up
    steps = {name: curve[-1][name] - first[name] for name in ("tokens", "seconds")}
    return {
        "tokens_per_second": steps["tokens"] / steps["seconds"],
        "evaluation_tokens_per_second": len(curve) * evaluation_tokens / evaluating,
        "start_seconds": start,
        **({"tokens_per_pass": float(sizes[-1])} if (sizes := outcome.get("tokens_per_pass")) else {}),
    }


def hours(seconds: Seconds, resources: Resources, workers: int) -> dict[str, float | None]:
    """GPU-hours, and hours of CPU threads, of workers that run so long side by side."""
    share = None if seconds is None else seconds * workers / 3600
    units = {"gpu_hours": resources.gpus, "thread_hours": resources.threads}
    return {name: None if share is None else share * count for name, count in units.items()}


def total(parts: Sequence[float | None]) -> float | None:
    """The sum, where every part is known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def against(plan: Mapping[str, Any], records: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate and the truth, with true / estimated: seconds by stage and in all, and adapter-samples of the search.

    Args:
        records: those of the ledger, now; `plan` has those of when it was made, so that what was spent before does not count.
    """
    before = plan["ledger"]
    true = {stage: _since(before, records, stage, lambda record: record["seconds"]) for stage in plan["stages"]}
    seconds = {stage: _pair(plan["stages"][stage]["seconds"], spent) for stage, spent in true.items()}
    scored = _since(before, records, "search", lambda record: record["details"].get("adapter_samples", 0))
    return {
        "seconds": seconds | {"total": _pair(plan["total"]["seconds"], sum(true.values()))},
        "adapter_samples": _pair(plan["adapter_samples"]["at_most"], scored),
    }


def _since(before: Mapping[str, Any], now: Mapping[str, Any], stage: str, read: Callable[[Mapping[str, Any]], float]) -> float:
    """What a stage has spent since; one that began anew, for another input, counts from nothing."""
    earlier = before.get(stage)
    return read(now[stage]) - (read(earlier) if earlier and earlier["key"] == now[stage]["key"] else 0)


def _pair(estimated: Seconds, true: float) -> dict[str, float | None]:
    return {"estimated": estimated, "true": true, "ratio": true / estimated if estimated else None}
