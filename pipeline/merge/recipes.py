"""A merge as a recipe: which donors, with which weights, by which method, at which rank."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.adapter import Adapter, alpha_at, from_factors
from pipeline.adapters.low_rank import Factors, ab_mean, dare, factorise, ties, truncate, weighted_sum
from pipeline.core.errors import AdapterError
from pipeline.model.base_model import Shapes

CPU = torch.device("cpu")

FUNCTIONS: dict[str, Callable[[Sequence[Factors], Sequence[float]], Factors | Tensor]] = {
    "exact": weighted_sum,
    "concat": weighted_sum,
    "fold": weighted_sum,
    "ab_mean": ab_mean,
    "ties": ties,
    "dare": dare,
}
"""Name of a method, as in `config.METHODS` -> how the factors of one module become one delta weight, factored or dense."""


@dataclass(frozen=True)
class Recipe:
    """How a mashup is made; `rank` is that of the result, `weighting` says where the weights come from. A module that
    `module_weights` names has weights of its own, one a donor."""

    donors: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    rank: int
    weighting: str = "equal"
    module_weights: dict[str, tuple[float, ...]] | None = None

    @property
    def name(self) -> str:
        return f"{self.method}-{len(self.donors)}" + ("" if self.weighting == "equal" else f"-{self.weighting}")

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Merged:
    """The adapter that a recipe gives, and the smallest share of a module's squared norm that truncation kept."""

    adapter: Adapter
    kept_energy: float


def merge(
    recipe: Recipe,
    donors: Sequence[Adapter],
    base: str,
    shapes: Shapes,
    alpha: float | None = None,
    seed: int = 0,
    on: torch.device = CPU,
) -> Merged:
    """Merge donors into one adapter over the union of their modules; a donor without a module adds nothing to it.

    Unless `alpha` is given, the result has that of `alpha_at` for the first donor. It is computed on the device `on`, a module
    after the other, and comes back to the host's memory.

    Raises:
        AdapterError: the method cannot merge these donors exactly, with the reason.
    """
    if recipe.method == "ab_mean":
        _require_alike(donors)
    deltas: dict[str, Factors] = {}
    kept = 1.0
    for module in sorted(set().union(*(donor.tensors for donor in donors))):
        weights = (recipe.module_weights or {}).get(module, recipe.weights)
        pairs = [(d.factors(module).to(on), w) for d, w in zip(donors, weights, strict=True) if module in d.tensors]
        merged = FUNCTIONS[recipe.method]([factors for factors, _ in pairs], [weight for _, weight in pairs])
        cut, energy = truncate(merged, recipe.rank) if isinstance(merged, Factors) else factorise(merged, recipe.rank)
        deltas[module], kept = cut.to(CPU), min(kept, energy)
    first = donors[0]
    alpha = alpha or alpha_at(recipe.rank, first.max_rank, abs(first.scale(first.modules[0])) or 1.0)
    return Merged(from_factors(base, deltas, recipe.rank, alpha, shapes, seed), kept)


def random_like(adapter: Adapter, base: str, shapes: Shapes, seed: int = 0) -> Adapter:
    """An adapter of random delta weights, each of the rank and the Frobenius norm of the given one's: a control that shows what
    the size of a start does alone."""
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Factors] = {}
    for module in adapter.modules:
        delta = adapter.factors(module)
        drawn = Factors(*(torch.randn(part.shape, generator=generator) for part in (delta.a_RI, delta.b_OR)))
        ratio = (delta.norm() / drawn.norm()) ** 0.5
        deltas[module] = Factors(drawn.a_RI * ratio, drawn.b_OR * ratio)
    return from_factors(base, deltas, adapter.max_rank, float(adapter.config.lora_alpha), shapes, seed)


def _require_alike(donors: Sequence[Adapter]) -> None:
    """A and B can be averaged apart only where rank, scale and modules agree."""
    first = donors[0]
    for donor in donors[1:]:
        if donor.modules != first.modules or any(
            donor.rank(m) != first.rank(m) or donor.scale(m) != first.scale(m) for m in first.modules
        ):
            raise AdapterError("ab_mean needs donors of one rank, alpha and set of target modules; use method: exact")
