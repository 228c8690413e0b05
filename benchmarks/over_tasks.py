"""What tasks say together: the mean of their differences, how sure it is, and what so many tasks could have shown.

The task is the unit: seeds are averaged within it, as runs of one task do not tell of other tasks. Plain functions over numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

MAX_FLIPS = 12
"""Tasks up to which all flips of sign are tried; beyond, a seeded draw of as many."""

RESAMPLES = 10_000
"""Of the bootstrap."""

DRAWS = 1_000
"""Studies that are simulated to find what could have been shown."""

LEVEL, POWER = 0.05, 0.8
"""Two-sided p below which a difference counts, and how often one is to be found."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """The mean over tasks with its 95 % bootstrap interval, and the p of its difference from zero. `detectable`: the mean
    difference that so many tasks of this spread show with a probability of 80 %; None: none, however large."""

    mean: float
    low: float
    high: float
    p: float
    tasks: int
    detectable: float | None


def over_tasks(differences: Sequence[float]) -> Means:
    """Of one value a task, which is a mean over its seeds."""
    low, high = bootstrap_interval(differences)
    mean = float(np.mean(differences))
    return Means(mean, low, high, sign_flips(differences), len(differences), detectable(differences))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean, tasks drawn with replacement (Efron and Tibshirani, 1993, chapter 13)."""
    drawn = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return float(low), float(high)


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences under flips of their signs (Fisher's permutation test)."""
    return float(_p_of(np.array([differences], float))[0])


def detectable(differences: Sequence[float]) -> float | None:
    """The smallest mean difference at which the test has p < LEVEL in POWER of the studies of so many tasks, whose differences
    are drawn with replacement from these, moved to this mean. None: with so few tasks no difference has such a p."""
    values = np.array(differences, float)
    spread = float(values.std())
    if 2.0 ** (1 - len(values)) >= LEVEL or spread < 1e-12:
        return None
    drawn_DN = np.random.default_rng(1).choice(values - values.mean(), (DRAWS, len(values)))
    low, high = 0.0, 8 * spread
    for _ in range(16):
        middle = (low + high) / 2
        found = (_p_of(drawn_DN + middle) < LEVEL).mean()
        low, high = (low, middle) if found >= POWER else (middle, high)
    return high


def _p_of(differences_DN: Values) -> Values:
    """p of each of D studies of N tasks."""
    n = differences_DN.shape[1]
    if n <= MAX_FLIPS:
        signs_FN = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs_FN = np.random.default_rng(0).choice((1.0, -1.0), (2**MAX_FLIPS, n))
    least_D = np.abs(differences_DN.sum(axis=1)) - 1e-9
    p: Values = (np.abs(differences_DN @ signs_FN.T) >= least_D[:, None]).mean(axis=1)
    return p
