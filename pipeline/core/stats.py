"""What is measured of a model on a set of samples: plain functions over arrays, one value a sample.

All losses are in nats a completion token: sums of -log p and of tokens are kept, and divided once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean per token and its standard error over samples."""

    mean: float
    stderr: float


def mean_per_token(sums: Values, n_tokens: Values) -> Estimate:
    """Ratio estimator R = sum(x_i) / sum(n_i) over samples i, with its standard error.

    The error is that of a ratio of two sample means, by the delta method:
    sqrt(n / (n - 1) * sum((x_i - R n_i)^2)) / sum(n_i) (Cochran, Sampling Techniques, 1977, section 2.11).
    One sample alone has no spread, nor has a mean that is no number: their error is NaN.

    Args:
        sums: shape (samples,), for instance the summed NLL of each sample, or a paired difference of two such sums.
        n_tokens: shape (samples,), completion tokens of each sample.
    """
    total = float(n_tokens.sum())
    mean = float(sums.sum()) / total
    n = len(sums)
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, float("nan"))
    residual = sums - mean * n_tokens
    return Estimate(mean, float(np.sqrt(n / (n - 1) * (residual**2).sum())) / total)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a share (Wilson, JASA 22, 1927): 95 % for z = 1.96."""
    share, shrunk = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def steps_to_parity(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """First step, linearly interpolated between evaluations, at which a loss curve comes down to `target`.

    Returns:
        The step; None where the curve never gets there.
    """
    for i, loss in enumerate(losses):
        if not loss <= target:  # NaN is not parity
            continue
        if i == 0 or not math.isfinite(losses[i - 1]):
            return float(steps[i])
        before, after = losses[i - 1], loss
        share = (before - target) / (before - after)
        return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def interpolate(steps: Sequence[float], values: Sequence[float], at: float) -> float:
    """Value of a curve at a step between two evaluations, linearly interpolated."""
    return float(np.interp(at, steps, values))


def best_init(inits: Mapping[str, Mapping[str, Any]]) -> str:
    """The start whose finetuned weights a run keeps: that of the lowest validation NLL, the first of several.

    Args:
        inits: by name, as in summary.json.
    """
    return min(inits, key=lambda init: float(inits[init]["validation_nll_best"]))
