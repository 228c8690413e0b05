"""What past targets teach of a new one: who may be among the best, by a few adapters that were scored on it. Pure functions.

Each adapter has a row of losses on samples of past targets, less the base's on the same samples. Adapters that did alike on these
are taken to do alike on the new target: Bayesian ridge regression on the principal components of these rows (Rasmussen and
Williams, 2006, chapter 2) learns the losses of the probes, a few adapters that were scored on the new target, and foretells those
of the others with their uncertainty.

Shapes: N adapters, M past samples, P probes, R principal components, F features.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

NOBODY: Indices = np.empty(0, np.int64)

COMPONENTS = 24
"""Principal components at most."""

USUAL_NOISE = 0.4
"""Of NOISES, where probes are chosen and nothing is known of the target yet."""

FAR = 4.0
"""Spreads from the median, at which losses are cut off."""

CHANCE = 0.001
"""An adapter is left out if its chance to be among the best is smaller, by errors as those that were seen (`Errors`). On sampled
losses with 8 past targets, 0.003 lost one of the best three in some searches of every kind, 0.001 in none."""

MOST_PEAKED = 3.0
"""Excess kurtosis of errors that counts at most; so much has Student's t with 6 degrees of freedom."""

ENOUGH = 16
"""Errors, below which nothing is made of them."""

SIGNALS = (0.1, 0.3, 1.0, 3.0, 10.0)
NOISES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Prior standard deviations that are tried, as multiples of the probes' own: of what the components explain, and of the rest."""


class Errors(NamedTuple):
    """How wrong foretold losses were of adapters that were scored afterwards, in foretold standard deviations: by how much these
    were too small (1 at least), and the excess kurtosis, which is 0 of a normal distribution."""

    scale: float = 1.0
    peaked: float = 0.0

    def quantile(self, chance: float) -> float:
        """Standard deviations, as foretold, by which a loss falls below its mean with this chance, negative: the expansion of
        Cornish and Fisher (1938) with a kurtosis."""
        z = NormalDist().inv_cdf(chance)
        return self.scale * (z + (z**3 - 3 * z) * self.peaked / 24)


AS_FORETOLD = Errors()


@dataclass(frozen=True)
class Prediction:
    """Of each adapter the mean of its loss on the new target, less the base's, in nats a token, and its standard deviation."""

    mean_N: Floats
    std_N: Floats


def components(past_NM: Floats) -> Floats:
    """What tells adapters apart by their losses on past samples: principal components, (N, R), with a mean square of 1 over all
    adapters and components' variance in proportion to what they explain.

    Args:
        past_NM: NaN where an adapter was not scored on a sample; each sample has some values, as has each adapter.
    """
    left_NR, size_R, _ = np.linalg.svd(np.nan_to_num(_standardized(past_NM)), full_matrices=False)
    parts_NR = (left_NR * size_R)[:, :COMPONENTS]
    total = math.sqrt((parts_NR**2).sum() / max(1, len(parts_NR)))
    return parts_NR / total if total else parts_NR


def choose_probes(parts_NR: Floats, count: int, first: Indices = NOBODY) -> Indices:
    """The adapters to score on the new target: one after the other, whoever is the least certain given those before.

    Args:
        parts_NR: as `components`.
        first: adapters that are scored on it already.
    """
    features_NF = _features(parts_NR, 1.0)
    chosen: list[int] = []
    inverse_FF = np.linalg.inv(np.eye(features_NF.shape[1]) + features_NF[first].T @ features_NF[first] / USUAL_NOISE**2)
    variance_N = np.einsum("nf,fg,ng->n", features_NF, inverse_FF, features_NF)
    left_N = np.ones(len(parts_NR), bool)
    left_N[first] = False
    for _ in range(min(count, int(left_N.sum()))):
        one = int(np.argmax(np.where(left_N, variance_N, -1.0)))
        left_N[one] = False
        chosen.append(one)
        column_F = inverse_FF @ features_NF[one]  # Sherman and Morrison's update of the inverse by one more row
        scale = USUAL_NOISE**2 + features_NF[one] @ column_F
        inverse_FF -= np.outer(column_F, column_F) / scale
        variance_N -= (features_NF @ column_F) ** 2 / scale
    return np.array(chosen, np.int64)


def predict(parts_NR: Floats, probes_P: Indices, loss_P: Floats) -> Prediction:
    """The losses of all adapters on the new target, from those of the probes.

    Args:
        loss_P: mean loss of each probe, less the base's.
    """
    y_P, center, scale = _standardized(loss_P[:, None])[:, 0], float(np.median(loss_P)), float(_spread(loss_P[:, None])[0])
    tried = [(signal, noise) for signal in SIGNALS for noise in NOISES]
    fits = [_fit(_features(parts_NR[probes_P], signal), y_P, noise) for signal, noise in tried]
    best = int(np.argmax([fit.evidence for fit in fits]))
    fit, (signal, noise) = fits[best], tried[best]
    features_NF = _features(parts_NR, signal)
    variance_N = np.einsum("nf,fg,ng->n", features_NF, fit.covariance_FF, features_NF) + noise**2
    return Prediction(center + scale * features_NF @ fit.weights_F, scale * np.sqrt(variance_N))


class _Fit(NamedTuple):
    """Bayesian ridge regression: the weights' mean and covariance, and the log evidence but for a constant."""

    weights_F: Floats
    covariance_FF: Floats
    evidence: float


def _fit(features_PF: Floats, y_P: Floats, noise: float) -> _Fit:
    precision_FF = features_PF.T @ features_PF / noise**2 + np.eye(features_PF.shape[1])
    projected_F = features_PF.T @ y_P / noise**2
    covariance_FF = np.linalg.inv(precision_FF).astype(np.float64)
    weights_F: Floats = covariance_FF @ projected_F
    fitted = y_P @ y_P / noise**2 - projected_F @ weights_F
    determinant = np.linalg.slogdet(precision_FF).logabsdet + 2 * len(y_P) * math.log(noise)
    return _Fit(weights_F, covariance_FF, float(-0.5 * (fitted + determinant)))


def _features(parts_NR: Floats, signal: float) -> Floats:
    """The components, and what all adapters have in common."""
    return np.column_stack([signal * parts_NR, np.ones(len(parts_NR))])


def next_probes(
    prediction: Prediction, probes_P: Indices, loss_P: Floats, keep: int, count: int, errors: Errors = AS_FORETOLD
) -> Indices:
    """Of those that are not scored yet up to `count` with the best chance to be among the `keep` best, the best one first; where
    nobody's is CHANCE at least, none."""
    last = np.sort(loss_P)[min(keep, len(loss_P)) - 1]
    lead_N = (last - prediction.mean_N) / prediction.std_N
    lead_N[probes_P] = -np.inf
    order = np.argsort(-lead_N, kind="stable")[:count]
    found: Indices = order[lead_N[order] > errors.quantile(CHANCE)]
    return found


def judge_errors(error_E: Floats) -> Errors:
    """What errors, in foretold standard deviations, tell of those to come. Scale and kurtosis are reduced by their own standard
    errors, as a few errors may be large or seem peaked by chance."""
    if len(error_E) < ENOUGH:
        return AS_FORETOLD
    centred_E = error_E - error_E.mean()
    kurtosis = np.mean(centred_E**4) / np.mean(centred_E**2) ** 2 - 3 if centred_E.any() else 0.0
    peaked = float(np.clip(kurtosis - math.sqrt(24 / len(error_E)), 0, MOST_PEAKED))
    scale = math.sqrt(np.mean(error_E**2)) * (1 - 1 / math.sqrt(2 * len(error_E)))
    return Errors(max(1.0, scale), peaked)


def _standardized(values_NM: Floats) -> Floats:
    """Each column around its median, in units of its spread; what blew up counts as far off, and is not all that is seen."""
    clipped: Floats = np.clip((values_NM - np.nanmedian(values_NM, axis=0)) / _spread(values_NM), -FAR, FAR)
    return clipped


def _spread(values_NM: Floats) -> Floats:
    """Of each column the standard deviation, as that of a normal distribution follows from its quartiles; 1 where it has none."""
    low_M, high_M = np.nanquantile(values_NM, [0.25, 0.75], axis=0)
    spread_M: Floats = np.where(high_M > low_M, (high_M - low_M) / 1.349, 1.0)
    return spread_M
