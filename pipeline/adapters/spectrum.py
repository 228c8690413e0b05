"""What an adapter's weights look like without running it: figures of its spectrum, and a sketch that tells who is like whom.

Shapes: M modules, R a rank, J directions of a sketch, F figures, N adapters.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adapters.adapter import Adapter
from pipeline.adapters.low_rank import Factors

FIGURES = ("leading singular value", "norm", "energy concentration", "spectral entropy", "kurtosis", "largest module")
DIRECTIONS = 16
SAME_DIRECTION = 1e-4
"""Sketches of which 1 - cosine is less are of one delta weight times a number; rounding to bfloat16 leaves some 1e-6."""

NEAR_DIRECTION = 0.02
"""The same of near copies: of a donor with some noise or coarser numbers, or of neighbouring checkpoints of one finetune. Donors
of unlike tasks have a cosine of 0.65 at most among those of SmolLM2-135M-Instruct that were looked at."""

SAME_SIZE = 0.01
FEWEST = 10
"""Adapters of a pool that are enough to say what is usual in it."""

UNUSUAL = 8.0
"""Robust z-score from which on a figure is an outlier."""

LEAST_SPREAD = 0.02
"""A figure's spread is taken for this at least, so that a pool of near copies has no outliers in the last digit."""

Values = NDArray[np.float64]


def spectrum(adapter: Adapter) -> list[float]:
    """The FIGURES. All but the last are means over the adapted modules: the kinds of figures by which arXiv 2602.15195 (section
    3) tells poisoned adapters from clean ones. Logarithms (base e) of the leading singular value and of the Frobenius norm; the
    leading one's share of the squared norm; the entropy of those shares, 1 where all are equal; the kurtosis of the singular
    values. The last is the logarithm of the largest norm over the median one: one module blown up is lost in a mean.
    """
    figures_M5 = torch.stack([_figures(_singular_values(adapter.factors(module))) for module in adapter.modules])
    norm_M, share_M = (figures_M5[:, FIGURES.index(name)] for name in ("norm", "energy concentration"))
    norms = norm_M[share_M > 0]  # a module of zeros has no share of energy, and no norm to speak of
    largest = float(norms.max() - norms.median()) if len(norms) else 0.0
    return [*figures_M5.mean(0).tolist(), largest]


def sketch(adapter: Adapter, salt: int) -> list[float]:
    """J random projections of all delta weights together: sum_m w_mj u_mj^T (s B A)_m v_mj, with the same u, v and w for every
    adapter; of a layer that is changed whole, of its change. Cosine and size of sketches are those of the delta weights, within
    1 / sqrt(J) for unlike ones.

    Args:
        salt: draws u, v and w. To those who make an adapter it must be unknown: they could give it any sketch.
    """
    total_J = torch.zeros(DIRECTIONS, dtype=torch.float64)
    for module in adapter.modules:
        delta = adapter.factors(module)
        left_RJ = delta.b_OR.double().T @ _drawn(salt, "left", delta.b_OR.shape[0])
        right_RJ = delta.a_RI.double() @ _drawn(salt, "right", delta.a_RI.shape[1])
        total_J += _drawn(salt, module, 1)[0] * (left_RJ * right_RJ).sum(0)
    for name, change in adapter.whole.items():
        change_OI = change.reshape(len(change), -1)
        left_IJ = change_OI.T @ _drawn(salt, "left", len(change)).float()
        right_IJ = _drawn(salt, "right", change_OI.shape[1])
        total_J += _drawn(salt, name, 1)[0] * (left_IJ.double() * right_IJ).sum(0)
    return [float(value) for value in total_J]


def families(sketches_NJ: Values, least: float = SAME_DIRECTION) -> tuple[list[int], list[float]]:
    """Of each adapter the first one of the same direction, often itself, and its size relative to that one. Directions are the
    same where 1 - cosine is less than `least`."""
    size_N = np.linalg.norm(sketches_NJ, axis=1)
    unit_NJ = sketches_NJ / np.maximum(size_N, 1e-300)[:, None]
    first = list(range(len(unit_NJ)))
    for n in range(len(unit_NJ)):
        if first[n] != n or not size_N[n]:
            continue
        rest = unit_NJ[n + 1 :] @ unit_NJ[n]
        for other in np.nonzero(rest > 1 - least)[0] + n + 1:
            if first[other] == other:
                first[other] = n
    return first, [float(size_N[n] / size_N[one]) if size_N[one] else 1.0 for n, one in enumerate(first)]


def outliers(figures_NF: Values) -> dict[int, str]:
    """Row -> what is unusual, of the adapters whose spectrum lies far from those of the pool, by median and MAD."""
    if len(figures_NF) < FEWEST:
        return {}
    middle_F = np.median(figures_NF, axis=0)
    spread_F = 1.4826 * np.median(np.abs(figures_NF - middle_F), axis=0)
    z_NF = (figures_NF - middle_F) / np.maximum(spread_F, LEAST_SPREAD)
    return {
        int(row): f"unusual weights: {FIGURES[worst]} {figures_NF[row, worst]:.3g}, the pool's median {middle_F[worst]:.3g} "
        f"(robust z {z_NF[row, worst]:+.0f})"
        for row in np.nonzero(np.abs(z_NF).max(axis=1) > UNUSUAL)[0]
        for worst in [int(np.abs(z_NF[row]).argmax())]
    }


def _singular_values(delta: Factors) -> Tensor:
    """Those of B A, shape (R,): of the small core R_b R_a^T, where B = Q_b R_b and A^T = Q_a R_a."""
    a_RI, b_OR = delta.a_RI.double(), delta.b_OR.double()
    return torch.linalg.svdvals(torch.linalg.qr(b_OR, mode="r")[1] @ torch.linalg.qr(a_RI.T, mode="r")[1].T)


def _figures(values_R: Tensor) -> Tensor:
    energy = float((values_R**2).sum())
    if not energy:
        return torch.zeros(len(FIGURES) - 1, dtype=torch.float64)
    share_R = values_R**2 / energy
    entropy = float(-(share_R * share_R.clamp(min=1e-300).log()).sum())
    centred_R = values_R - values_R.mean()
    variance = float((centred_R**2).mean())
    kurtosis = float((centred_R**4).mean()) / variance**2 if variance > 1e-12 * energy else 0.0
    levels = np.log(len(values_R)) if len(values_R) > 1 else 1.0
    return torch.tensor(
        [float(values_R.max().log()), 0.5 * np.log(energy), float(share_R.max()), entropy / levels, kurtosis], dtype=torch.float64
    )


@lru_cache(maxsize=4096)
def _drawn(salt: int, name: str, width: int) -> Tensor:
    """Normal numbers, shape (width, J)."""
    seed = int.from_bytes(hashlib.sha256(f"{salt} {name} {width}".encode()).digest()[:7], "little")
    return torch.randn(width, DIRECTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
