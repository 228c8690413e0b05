"""Merging LoRA factors: pure functions over tensors.

Shapes: O out features, I in features, R a rank. A linear layer W_OI with an adapter computes
W x + s B A x, with lora_a_RI, lora_b_OR and the scale s = alpha / r (alpha / sqrt(r) with rsLoRA). The delta weight is
s B A; only its factors are ever held.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from peft.utils import merge_utils
from torch import Tensor

DENSITY = 0.5
"""Share of a delta weight's values that TIES and DARE keep."""

NULL_RANK = 1e-6
"""Share of the largest singular value below which one is rounding."""

CANCELLING = 16.0
"""||B|| ||A|| over ||B A||: of R ranks of like size that are independent, it is the root of R."""

OVERSAMPLING, ITERATIONS = 8, 4
"""Columns beyond the wished rank, and power iterations, of the randomised SVD."""


class Delta(Protocol):
    """A delta weight, however it is held."""

    def dense(self) -> Tensor:
        """The delta weight itself, shape (O, I)."""
        ...


@dataclass(frozen=True)
class Whole:
    """The change of a weight that has no factors; shape (O, I), or (O,) of a norm or bias."""

    delta: Tensor

    def dense(self) -> Tensor:
        return self.delta


@dataclass(frozen=True)
class Factors:
    """A delta weight b_OR @ a_RI, its scale already inside."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def to(self, device: torch.device) -> "Factors":
        return Factors(self.a_RI.to(device), self.b_OR.to(device))

    def dense(self) -> Tensor:
        """The delta weight itself, shape (O, I)."""
        return self.b_OR @ self.a_RI

    def norm(self) -> float:
        """Frobenius norm of the delta weight: ||B A||^2 = tr(B^T B A A^T)."""
        return float(((self.b_OR.T @ self.b_OR) * (self.a_RI @ self.a_RI.T)).sum().clamp(min=0).sqrt())


def weighted_sum(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Exactly sum_i w_i B_i A_i, by stacking the factors: the rank is the sum of the ranks."""
    a_RI = torch.cat([part.a_RI for part in parts])
    b_OR = torch.cat([weight * part.b_OR for part, weight in zip(parts, weights, strict=True)], dim=1)
    return Factors(a_RI, b_OR)


def dense_sum(parts: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """sum_i w_i of delta weights that have no factors."""
    first, *others = (weight * part.dense() for part, weight in zip(parts, weights, strict=True))
    return sum(others, first)


def rounding_error(delta: Factors) -> float:
    """||B A - B' A'|| / ||B A|| in the Frobenius norm, where B' and A' are the factors in bfloat16, as engines hold them; 0 where
    the factors are too small beside their product for large ones among them to cancel."""
    exact = Factors(delta.a_RI.double(), delta.b_OR.double())
    factors, norm = float(exact.a_RI.norm() * exact.b_OR.norm()), exact.norm()
    if factors <= CANCELLING * norm:
        return 0.0
    rounded = Factors(delta.a_RI.bfloat16().double(), delta.b_OR.bfloat16().double())
    return weighted_sum([exact, rounded], [1.0, -1.0]).norm() / max(norm, 1e-300)


def truncate(delta: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of a delta weight at a given rank, balanced, without ever forming the (O, I) matrix.

    B = Q_b R_b and A^T = Q_a R_a turn B A into Q_b (R_b R_a^T) Q_a^T; the SVD of the small (R, R) core gives the
    truncated SVD of the whole (optimal by Eckart and Young, 1936). Each factor takes sqrt(S).

    Returns:
        The factors, of rank min(rank, R, O, I), and the share of the squared Frobenius norm that they keep.
    """
    q_b, r_b = torch.linalg.qr(delta.b_OR)
    q_a, r_a = torch.linalg.qr(delta.a_RI.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    factors = Factors(root[:, None] * (vh[:kept] @ q_a.T), (q_b @ u[:, :kept]) * root)
    energy = float((s**2).sum())
    return factors, float((s[:kept] ** 2).sum()) / energy if energy else 1.0


def ab_mean(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Weighted sums of the A's and of the B's apart, as the paper's code does (arXiv 2603.10156, section 3).

    Not the mean of the delta weights: mean(B) mean(A) has the cross products B_i A_j in it. All ranks must agree.
    """
    a_RI = sum((weight * part.a_RI for part, weight in zip(parts, weights, strict=True)), torch.zeros(()))
    b_OR = sum((weight * part.b_OR for part, weight in zip(parts, weights, strict=True)), torch.zeros(()))
    return Factors(a_RI, b_OR)


def ties(parts: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """TIES (arXiv 2306.01708, section 3) on the delta weights themselves, by PEFT's own function: the smaller half of each is
    set to zero, each value takes the sign of the larger total, and those that agree are averaged.

    Weights are relative to equal ones, 1 / number of parts, which give the mean of those that agree.

    Returns:
        The merged delta weight, shape (O, I); it has full rank.
    """
    dense = [part.dense() for part in parts]
    return merge_utils.ties(dense, torch.tensor(weights, device=dense[0].device) * len(parts), DENSITY)


def dare(parts: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """DARE (arXiv 2311.03099, equation 3) on the delta weights themselves, by PEFT's own function: half of the values of each are
    dropped at random, with a fixed seed, the others doubled, and the weighted sum is taken. A GPU drops others than a CPU.

    Returns:
        The merged delta weight, shape (O, I); it has full rank.
    """
    dense = [part.dense() for part in parts]
    with _drawing(dense[0].device):
        return merge_utils.dare_linear(dense, torch.tensor(weights, device=dense[0].device), DENSITY)


def factorise(delta_OI: Tensor, rank: int) -> tuple[Factors, float]:
    """The approximation of a dense delta weight at a given rank, balanced, by a randomised SVD (arXiv 0909.4061, algorithm 4.4)
    that is exact where the rank is that of the delta weight.

    Returns:
        As `truncate`.
    """
    kept = min(rank, *delta_OI.shape)
    with _drawing(delta_OI.device):
        u, s, v = torch.svd_lowrank(delta_OI, q=min(kept + OVERSAMPLING, *delta_OI.shape), niter=ITERATIONS)
    root = s[:kept].sqrt()
    energy = float((delta_OI**2).sum())
    return Factors(root[:, None] * v[:, :kept].T, u[:, :kept] * root), float((s[:kept] ** 2).sum()) / energy if energy else 1.0


def drop_null_rank(delta: Factors) -> Factors:
    """The same delta weight without the rank that adds nothing to it. A training step moves it by dB A + B dA: where both factors
    are zero, that rank would never learn."""
    strength_R = delta.a_RI.norm(dim=1) * delta.b_OR.norm(dim=0)
    kept_R = strength_R > NULL_RANK * strength_R.max()
    return Factors(delta.a_RI[kept_R], delta.b_OR[:, kept_R])


def pad(delta: Factors, rank: int, generator: torch.Generator) -> Factors:
    """The same delta weight with factors of a larger rank: new rows of A are drawn as PEFT draws a fresh A
    (Kaiming uniform, a = sqrt(5), that is U(-1, 1) / sqrt(I)), new columns of B are zero, so that the added rank can learn."""
    missing = rank - delta.rank
    if missing <= 0:
        return delta
    width = delta.a_RI.shape[1]
    fresh_a = (torch.rand(missing, width, generator=generator) * 2 - 1) / width**0.5
    fresh_b = torch.zeros(delta.b_OR.shape[0], missing)
    return Factors(torch.cat([delta.a_RI, fresh_a]), torch.cat([delta.b_OR, fresh_b], dim=1))


@contextmanager
def _drawing(device: torch.device) -> Iterator[None]:
    """Within, random numbers of a fixed seed; afterwards those that would have come without it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
