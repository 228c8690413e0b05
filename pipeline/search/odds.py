"""Who of a rung's candidates may still be among the best: a race's rule where past targets have said who races. Pure functions.

A model of the paired differences, candidate i on sample s: d_is = a_s + b_s skill_i + noise_is. Samples differ in how much they
ask of all candidates (a_s, which cancels), in how far they tell them apart (b_s), and in their noise. b_s is the slope of a
sample's differences on what the other samples say of the skills; a skill is estimated by generalized least squares, and shrunk
towards the mean of all by the share of the spread that is noise (empirical Bayes: Efron and Morris, 1975).

Shapes: M candidates, S samples that all of them saw.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FAR = 6.0
"""Spreads from a sample's median, at which differences are cut off: what blew up is not all that is seen."""

LEAST_SCALE = 0.1
"""Of a sample's b_s, whose mean is 1."""

ROUNDS = 20
"""In which the samples' scales are found."""

PRIOR_SAMPLES = 8
"""Weight of the typical variance beside a candidate's own."""

LEAST_SIGNAL = 0.2
"""Of the spread of the skills that were found, what is taken for real at least: else a noisy first rung would tell nothing."""


class Skills(NamedTuple):
    """Of each candidate the posterior mean and variance of its skill, the lower the better, in units of the differences."""

    mean_M: Floats
    variance_M: Floats


def estimate_skills(difference_MS: Floats) -> Skills:
    """What the differences of candidates to one reference, any, say of their skills.

    Args:
        difference_MS: finite, of two samples and three candidates at least.
    """
    centred_MS = _without_outliers(difference_MS)
    centred_MS = centred_MS - centred_MS.mean(axis=0)
    scale_S = sample_scales(centred_MS)
    residual_MS = centred_MS - np.outer(centred_MS.mean(axis=1), scale_S)
    noise_S = np.maximum((residual_MS**2).mean(axis=0), 1e-12 + 1e-3 * (centred_MS**2).mean())
    information = (scale_S**2 / noise_S).sum()
    skill_M = (centred_MS * scale_S / noise_S).sum(axis=1) / information
    left_M = ((centred_MS - np.outer(skill_M, scale_S)) ** 2 / noise_S).sum(axis=1)
    own_M = left_M / max(1, len(scale_S) - 1)
    n = len(scale_S)
    error_M = ((n - 1) * own_M + PRIOR_SAMPLES * np.mean(own_M)) / (n - 1 + PRIOR_SAMPLES) / information
    spread = skill_M.var()
    signal = max(spread - float(np.mean(error_M)), LEAST_SIGNAL * spread) + 1e-12
    trust_M = signal / (signal + error_M)
    return Skills(trust_M * skill_M, trust_M * error_M + 1e-12)


def sample_scales(centred_MS: Floats) -> Floats:
    """b_s of each sample, with a mean of 1: slopes on skills that the other samples tell, and these by the slopes, in turn."""
    scale_S = np.ones(centred_MS.shape[1])
    for _ in range(ROUNDS):
        product_MS = centred_MS * scale_S
        others_MS = (product_MS.sum(axis=1, keepdims=True) - product_MS) / ((scale_S**2).sum() - scale_S**2)
        slope_S = (centred_MS * others_MS).sum(axis=0) / np.maximum((others_MS**2).sum(axis=0), 1e-12)
        scale_S = np.maximum(slope_S, LEAST_SCALE)
        scale_S = scale_S / scale_S.mean()
    return scale_S


def may_be_best(difference_MS: Floats, best: int, risk: float) -> NDArray[np.bool_]:
    """Whether each candidate is to go on; shape (M,). Of those that are not, `risk` at most is expected to be as good as the
    last of the `best`: the least likely ones are dropped."""
    skills = estimate_skills(difference_MS)
    order = np.argsort(skills.mean_M, kind="stable")
    last = order[min(best, len(order)) - 1]
    lead_M = (skills.mean_M[last] - skills.mean_M) / np.sqrt(skills.variance_M + skills.variance_M[last])
    chance_M = np.array([0.5 * math.erfc(-lead / math.sqrt(2)) for lead in lead_M])
    unlikely = np.argsort(chance_M, kind="stable")
    stays_M = np.ones(len(chance_M), bool)
    stays_M[unlikely[np.cumsum(chance_M[unlikely]) <= risk]] = False
    return stays_M


def _without_outliers(difference_MS: Floats) -> Floats:
    median_S = np.median(difference_MS, axis=0)
    low_S, high_S = np.quantile(difference_MS, [0.25, 0.75], axis=0)
    reach_S = FAR * np.maximum((high_S - low_S) / 1.349, 1e-9)
    within: Floats = np.clip(difference_MS, median_S - reach_S, median_S + reach_S)
    return within
