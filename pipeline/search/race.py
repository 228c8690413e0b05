"""Which candidates advance: successive halving of candidates on paired samples. Pure rules; no Ray here.

All candidates see the same samples in the same order. A rung is a number of samples. When all who entered a rung have been
scored on its samples, it closes: the best go on to the next rung, the others stop. Who goes on depends on the scores alone,
neither on the order in which these come nor on the number of workers, so that a race which was broken off and taken up again
ends like one that ran through, unless its budget is in seconds. Workers need not wait for a rung to close: a candidate that is
sure to go on, however the missing scores turn out, is given out for the next rung at once. This is like ASHA
(arXiv 1810.05934), except that a candidate is promoted early only where the missing scores cannot change it.

Shapes: N candidates, M some of them, S samples in the order in which they are scored.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.search.odds import may_be_best

BASE = 0
"""The candidate that is the base model: it is measured on every sample and competes with nobody."""

KEEP = 8
"""Candidates that go through to the end at least, in a pool of four times as many: the largest mashup has so many donors."""

FEWEST = 5
"""The same in the smallest pool; with four, one of the best three was lost in one search of ten on a real pool of 18."""

FIRST_RUNG = 4
"""Samples of the first rung at most."""

SMALL_POOL = 2
"""The budget is never less than scoring so many times the finalists on every sample."""

CONFIDENCE = 0.99
"""With which a candidate is out, where the budget says nothing of it."""

PRIOR_SAMPLES = 4
"""Weight of the typical variance beside a candidate's own."""

BEST = 5
"""Whoever may be as good as the last of so many goes on, where a schedule has a risk."""

FEWER = 0.8
"""Early promotion is looked at again once the missing scores have fallen to this share of those at the last look."""

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """The rungs (samples seen at the end of each, rising), the adapter-samples that the race may use (None: no limit), the
    one-sided confidence with which a candidate is out (1: none ever is), how many go through to the end at least, and how many
    of the best may be expected to be lost at the end of a rung (`odds.may_be_best`; 0: this rule is not asked)."""

    rungs: tuple[int, ...]
    budget: float | None
    confidence: float
    keep: int = KEEP
    risk: float = 0.0


def finalists(n_candidates: int) -> int:
    """How many of so many candidates go through to the end at least."""
    return min(KEEP, max(FEWEST, n_candidates // 4))


def make_schedule(
    n_candidates: int,
    n_search: int,
    n_holdout: int,
    share: float | None,
    confidence: float = CONFIDENCE,
    risk: float = 0.0,
) -> Schedule:
    """Rungs of 4, 8, 16, ... samples up to the search split, and the hold-out split as the last. With a risk, rungs of 6, 12, ...
    lie between: who is unlikely to be among the best is dropped the sooner.

    Args:
        share: adapter-samples allowed, as a share of scoring every candidate on every sample; None: no limit.
        confidence, risk: as in `Schedule`.
    """
    n_samples = n_search + n_holdout
    keep = finalists(n_candidates)
    if share == 1 or n_candidates <= SMALL_POOL * keep:
        return Schedule((n_samples,), None, 1.0)
    first = FIRST_RUNG if share is None else int(np.clip(share * n_samples / 3, 2, FIRST_RUNG))
    doubling = [first * 2**power for power in range(n_search) if first * 2**power < n_search]
    between = [3 * end // 2 for end in doubling if risk and 3 * end // 2 < n_search]
    budget = None if share is None else max(share * n_candidates, SMALL_POOL * keep) * n_samples
    rungs = (*sorted({*doubling, *between}), n_search, n_samples)
    return Schedule(rungs, budget, confidence, keep, risk)


def surely_above(nll_MS: Floats, reference_S: Floats, tokens_S: Floats, confidence: float) -> NDArray[np.bool_]:
    """Whether each candidate's mean NLL lies above the reference's with this confidence; shape (M,).

    The bound is on the paired difference a token, with the standard error of `stats.mean_per_token`. A few samples tell
    little of a candidate's own variance, so that it is shrunk towards the median of all (the moderated t of Smyth, 2004,
    with a fixed prior weight).
    """
    total, n = tokens_S.sum(), len(tokens_S)
    with np.errstate(invalid="ignore"):  # a candidate that gave infinity has no variance, and is out
        difference_MS = nll_MS - reference_S
        mean_M = difference_MS.sum(axis=1) / total
        residual_MS = difference_MS - mean_M[:, None] * tokens_S
        variance_M = n / (n - 1) * (residual_MS**2).sum(axis=1) / total**2
        typical = np.nanmedian(variance_M)
        shrunk_M = ((n - 1) * variance_M + PRIOR_SAMPLES * typical) / (n - 1 + PRIOR_SAMPLES)
        bound_M = mean_M - NormalDist().inv_cdf(confidence) * np.sqrt(shrunk_M)
    above: NDArray[np.bool_] = ~(bound_M <= 0)
    return above


def fair_batch(waiting: int, engines: int, most: int) -> int:
    """How many of those that wait an engine takes: `most`, and towards the end of a rung no more than its share, so that all
    engines come to the end of it at about the same time (guided self-scheduling: Polychronopoulos and Kuck, 1987)."""
    return max(1, min(most, math.ceil(waiting / max(1, engines))))


class Race:
    """The state of a race; what is known of it before it starts goes into `nll_NS` (NaN: unknown)."""

    def __init__(
        self, schedule: Schedule, tokens_S: Sequence[int], nll_NS: Floats, left: Callable[[], float] | None = None
    ) -> None:
        """
        Args:
            tokens_S: completion tokens of each sample.
            nll_NS: nats summed over each sample's completion, candidates in the order in which they shall be scored.
            left: gives the adapter-samples that can still be afforded, in place of the schedule's budget.
        """
        self._left = left or self._left_of_budget
        self.schedule = schedule
        self.tokens_S = np.asarray(tokens_S, np.float32)
        self.nll_NS = nll_NS
        self.aside_N = np.zeros(len(nll_NS), bool)
        self.rungs_N = np.zeros(len(nll_NS), np.int64)
        """How many rungs each candidate entered."""
        self.rung = -1
        self.stopped: list[int] = []
        """Candidates that will not be scored again, in the order in which that was known."""
        self._spent = 0.0
        self._pending: deque[int] = deque()
        self._lacking: set[int] = set()
        self._taken: set[int] = set()
        self._early: set[int] = set()
        """Of those that wait, who does so for the next rung."""
        self._entrants = np.arange(len(nll_NS))
        self._open(self._entrants)
        self._advance()

    @property
    def over(self) -> bool:
        return self.rung == len(self.schedule.rungs)

    @property
    def entrants(self) -> int:
        """Candidates that entered the open rung."""
        return len(self._entrants)

    def racing(self) -> Indices:
        """Candidates that have not stopped; some may be set aside."""
        return self._entrants

    @property
    def outstanding(self) -> int:
        """Candidates of the open rung that lack scores."""
        return len(self._lacking)

    @property
    def waiting(self) -> int:
        """Candidates that can be taken, as far as that is known."""
        return len(self._pending)

    def seen_N(self) -> Indices:
        """Samples that count for each candidate: those of the rungs that it entered."""
        ends: Indices = np.array([0, *self.schedule.rungs])[self.rungs_N]
        return ends

    def take(self, count: int) -> tuple[list[int], Indices]:
        """Up to `count` candidates to score next, and the samples that all of them lack; empty where nothing can be done now."""
        if not self._pending:
            self._early.update(sure := self._sure())
            self._pending.extend(sure)
        taken: list[int] = []
        samples = np.empty(0, np.int64)
        while self.head() is not None and len(taken) < count:
            lacks = self._lacks(self._pending[0])
            if taken and not np.array_equal(lacks, samples):
                break
            taken.append(self._pending.popleft())
            samples = lacks
        self._taken.update(taken)
        return taken, samples

    def exchange(
        self, taken: Sequence[int], samples: Indices, held: Iterable[int], preference: Callable[[int], float]
    ) -> list[int]:
        """Give some of those that were taken back for others of `held` that wait, lack the same samples and are preferred to
        them. Gives who is taken now, as many."""
        asked = {candidate: preference(candidate) for candidate in taken}
        least = min(asked.values())
        better = {one: value for one in held if self._is_free(one) and (value := preference(one)) > least}
        coming = islice(
            (one for one in sorted(better, key=better.__getitem__, reverse=True) if self._waits_for(one, samples)), len(taken)
        )
        offered = asked | {one: better[one] for one in coming}
        now = sorted(offered, key=offered.__getitem__, reverse=True)[: len(taken)]  # of equals, who was taken stays
        for one in set(now) - asked.keys():
            with suppress(ValueError):  # who was given back early waits in no row
                self._pending.remove(one)
        self._taken.update(now)
        self.give_back(one for one in taken if one not in now)
        return now

    def _is_free(self, candidate: int) -> bool:
        return candidate != BASE and candidate not in self._taken and (candidate in self._lacking or candidate in self._early)

    def _waits_for(self, candidate: int, samples: Indices) -> bool:
        return self._waits(candidate) and np.array_equal(self._lacks(candidate), samples)

    def head(self) -> int | None:
        """Who will be taken next, as far as that is known; those whose scores came from elsewhere while they waited are not."""
        while self._pending and not self._waits(self._pending[0]):
            self._pending.popleft()
        return self._pending[0] if self._pending else None

    def _waits(self, candidate: int) -> bool:
        wanted = candidate in self._lacking or candidate in self._early
        return wanted and not self.aside_N[candidate] and len(self._lacks(candidate)) > 0

    def give_back(self, candidates: Iterable[int]) -> None:
        """Candidates that were taken and for which no scores came: they are taken again before the others."""
        back = [candidate for candidate in candidates if candidate in self._taken]
        self._taken.difference_update(back)
        self._pending.extendleft(candidate for candidate in reversed(back) if candidate in self._lacking)

    def report(self, candidate: int, samples: Indices, nll_S: Sequence[float]) -> None:
        """Scores of a candidate that was taken; as `learn`."""
        self._taken.discard(candidate)
        self.learn(candidate, samples, nll_S)

    def learn(self, candidate: int, samples: Indices, nll_S: Sequence[float]) -> None:
        """Scores of a candidate, in nats summed over each sample's completion. NaN is the worst that there is. Whoever took it
        has it still, until it is given back."""
        self.nll_NS[candidate, samples] = np.nan_to_num(np.asarray(nll_S, np.float32), nan=np.inf, posinf=np.inf)
        if candidate in self._lacking and not len(self._unknown(candidate, self.schedule.rungs[self.rung])):
            self._done(candidate)

    def set_aside(self, candidate: int) -> None:
        """A candidate that cannot be scored; the race goes on without it."""
        self.aside_N[candidate] = True
        self._taken.discard(candidate)
        if candidate in self._lacking:
            self._done(candidate)

    def drop_pending(self) -> list[int]:
        """Leave out who waits in the first rung, as there is no time for them."""
        if self.rung:
            return []
        dropped = [candidate for candidate in self._pending if candidate != BASE]
        self._pending = deque(candidate for candidate in self._pending if candidate == BASE)
        for candidate in dropped:
            self.set_aside(candidate)
        return dropped

    def survivors(self) -> Indices:
        """Who of the open rung goes on: the lowest means, as many as the budget allows, without those that are surely above the
        last finalist so far; and the base. In the order of scoring."""
        best = self._not_out(self._ranked()[: self._quota()])
        return np.sort(np.append(best, BASE)) if not self.aside_N[BASE] else np.sort(best)

    def _open(self, entrants: Indices) -> None:
        self.rung += 1
        self.stopped.extend(np.setdiff1d(self._entrants, entrants).tolist())
        self._entrants, self._lacking, self._pending = entrants, set(), deque()
        self._early.clear()
        self._looked_at = math.inf
        if self.over:
            return
        start, end = list(pairwise((0, *self.schedule.rungs)))[self.rung]
        self._spent += len(entrants) * (end - start)
        self.rungs_N[entrants] += 1
        unknown = np.isnan(self.nll_NS[entrants, :end]).any(axis=1) & ~self.aside_N[entrants]
        self._lacking.update(entrants[unknown].tolist())
        self._pending.extend(candidate for candidate in entrants[unknown].tolist() if candidate not in self._taken)

    def _done(self, candidate: int) -> None:
        self._lacking.remove(candidate)
        self._advance()

    def _advance(self) -> None:
        """Close the open rung once nobody lacks scores, and open the next: several, where the scores are known already."""
        while not (self._lacking or self.over):
            is_last = self.rung + 1 == len(self.schedule.rungs)
            self._open(np.empty(0, np.int64) if is_last else self.survivors())

    def _quota(self) -> int:
        """How many may enter the next rung: the rungs to come shrink by one factor, the largest that can be afforded."""
        entrants, lengths, left = len(self._entrants), np.diff((0, *self.schedule.rungs))[self.rung + 1 :], self._left()
        if math.isinf(left) or not len(lengths):
            return entrants
        powers = np.arange(1, len(lengths) + 1)
        low, high = 0.0, 1.0
        for _ in range(40):
            factor = (low + high) / 2
            cost = ((np.maximum(entrants * factor**powers, self.schedule.keep) + 1) * lengths).sum()  # the base is one more
            low, high = (factor, high) if cost <= left else (low, factor)
        return max(self.schedule.keep, int(entrants * low))

    def _left_of_budget(self) -> float:
        return math.inf if self.schedule.budget is None else self.schedule.budget - self._spent

    def _ranked(self) -> Indices:
        """Entrants of the open rung whose scores are all there, without the base, the lowest mean first."""
        end = self.schedule.rungs[self.rung]
        known_N = ~self.aside_N
        known_N[[BASE, *self._lacking]] = False
        rivals = self._entrants[known_N[self._entrants]]
        ranked: Indices = rivals[np.argsort(self.nll_NS[rivals, :end].sum(axis=1), kind="stable")]
        return ranked

    def _not_out(self, best: Indices) -> Indices:
        """Without those that are surely above the last of the best that are kept; `best` is in the order of means."""
        keep = self.schedule.keep
        if len(best) <= keep:
            return best
        end = self.schedule.rungs[self.rung]
        losses_MS, reference_S = self.nll_NS[best, :end], self.nll_NS[best[keep - 1], :end]
        out = surely_above(losses_MS, reference_S, self.tokens_S[:end], self.schedule.confidence)
        out |= self._unlikely(best, end)
        return best[~out | (np.arange(len(best)) < keep)]

    def _unlikely(self, candidates: Indices, end: int) -> NDArray[np.bool_]:
        """Who is not likely enough to be among the best, where the schedule has a risk. Differences are per token."""
        unlikely = np.zeros(len(candidates), bool)
        difference_MS = (self.nll_NS[candidates, :end] - self.nll_NS[candidates[0], :end]) / self.tokens_S[:end]
        sound = np.isfinite(difference_MS).all(axis=1)
        if self.schedule.risk and sound.sum() > self.schedule.keep and end > 1:
            unlikely[sound] = ~may_be_best(difference_MS[sound].astype(np.float64), BEST, self.schedule.risk)
        return unlikely

    def _sure(self) -> list[int]:
        """Who goes on whatever the missing scores turn out to be, and is not yet at it."""
        if self.over or self.rung + 1 == len(self.schedule.rungs) or self.outstanding > FEWER * self._looked_at:
            return []
        self._looked_at = self.outstanding
        few = math.isinf(self._left()) or self.schedule.risk  # who is likely enough is not known before all scores are
        certain = (self.schedule.keep if few else self._quota()) - self.outstanding
        end = self.schedule.rungs[self.rung + 1]
        ranked = self._not_out(self._ranked()[: max(0, certain)]).tolist()
        return [c for c in ranked if c not in self._taken and len(self._unknown(c, end))]

    def _lacks(self, candidate: int) -> Indices:
        ahead, last = candidate not in self._lacking, len(self.schedule.rungs) - 1
        return self._unknown(candidate, self.schedule.rungs[min(self.rung + ahead, last)])

    def _unknown(self, candidate: int, end: int) -> Indices:
        unknown: Indices = np.flatnonzero(np.isnan(self.nll_NS[candidate, :end]))
        return unknown
