"""A merge as a recipe: which donors, with which weights, by which method, at which rank."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.adapter import Adapter, alpha_at, from_factors
from pipeline.adapters.low_rank import Delta, Factors, Whole, ab_mean, dare, dense_sum, factorise, ties, truncate, weighted_sum
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

ON_WHOLE: dict[str, Callable[[Sequence[Delta], Sequence[float]], Tensor]] = {"ties": ties, "dare": dare}
"""Likewise for layers that donors change whole, which have no factors; other methods take the weighted sum."""


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

    def weighted(self, donors: Sequence[Adapter], module: str) -> list[tuple[Adapter, float]]:
        """The donors with their weights in a module, or in a weight that they change whole."""
        return list(zip(donors, (self.module_weights or {}).get(module, self.weights), strict=True))

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
    """Merge donors into one adapter over the union of their modules; a donor without a module adds nothing to it. So it is with
    layers that donors change whole, of which nothing is ever cut; what others add to one of these by factors is added there.

    Unless `alpha` is given, the result has that of `alpha_at` for the first donor. It is computed on the device `on`, a module
    after the other, and comes back to the host's memory.

    Raises:
        AdapterError: the method cannot merge these donors exactly, with the reason.
    """
    if recipe.method == "ab_mean":
        _require_alike(donors)
    deltas: dict[str, Factors] = {}
    kept, whole = 1.0, _merged_whole(recipe, donors, on)
    for module in sorted(set().union(*(donor.tensors for donor in donors)) - {name.rpartition(".")[0] for name in whole}):
        pairs = [(d.factors(module).to(on), w) for d, w in recipe.weighted(donors, module) if module in d.tensors]
        merged = FUNCTIONS[recipe.method]([factors for factors, _ in pairs], [weight for _, weight in pairs])
        cut, energy = truncate(merged, recipe.rank) if isinstance(merged, Factors) else factorise(merged, recipe.rank)
        deltas[module], kept = cut.to(CPU), min(kept, energy)
    if not deltas:
        raise AdapterError(
            "each layer that one of the donors adapts is replaced whole by another, which leaves no factors to train"
        )
    first = donors[0]
    alpha = alpha or alpha_at(recipe.rank, first.max_rank, abs(first.scale(first.modules[0])) or 1.0)
    adapter = from_factors(base, deltas, recipe.rank, alpha, shapes, seed)
    return Merged(replace(adapter, whole=whole), kept)


def _merged_whole(recipe: Recipe, donors: Sequence[Adapter], on: torch.device) -> dict[str, Tensor]:
    """The changes of layers that donors change whole, with what others change in them by factors."""
    names = set[str]().union(*(donor.whole for donor in donors))
    adapted = set[str]().union(*(donor.tensors for donor in donors))
    names |= {f"{module}.weight" for name in names if (module := name.rpartition(".")[0]) in adapted}  # where a bias is all
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        module = name.removesuffix(".weight")
        pairs: list[tuple[Delta, float]] = [
            (Whole(d.whole[name].to(on)), w) for d, w in recipe.weighted(donors, name) if name in d.whole
        ]
        pairs += [(d.factors(module).to(on), w) for d, w in recipe.weighted(donors, module) if module in d.tensors]
        merged = ON_WHOLE.get(recipe.method, dense_sum)([delta for delta, _ in pairs], [weight for _, weight in pairs])
        found[name] = merged.to(CPU)
    return found


def random_like(adapter: Adapter, base: str, shapes: Shapes, seed: int = 0) -> Adapter:
    """An adapter of random delta weights, each of the rank and the Frobenius norm of the given one's, and of random changes of
    the layers that it changes whole: a control that shows what the size of a start does alone."""
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Factors] = {}
    for module in adapter.modules:
        delta = adapter.factors(module)
        drawn = Factors(*(torch.randn(part.shape, generator=generator) for part in (delta.a_RI, delta.b_OR)))
        ratio = (delta.norm() / drawn.norm()) ** 0.5
        deltas[module] = Factors(drawn.a_RI * ratio, drawn.b_OR * ratio)
    drawn_whole = {name: torch.randn(change.shape, generator=generator) for name, change in adapter.whole.items()}
    whole = {name: drawn * (adapter.whole[name].norm() / drawn.norm()) for name, drawn in drawn_whole.items()}
    alike = from_factors(base, deltas, adapter.max_rank, float(adapter.config.lora_alpha), shapes, seed)
    return replace(alike, whole=whole)


def _require_alike(donors: Sequence[Adapter]) -> None:
    """A and B can be averaged apart only where rank, scale and modules agree."""
    first = donors[0]
    for donor in donors[1:]:
        if donor.modules != first.modules or any(
            donor.rank(m) != first.rank(m) or donor.scale(m) != first.scale(m) for m in first.modules
        ):
            raise AdapterError("ab_mean needs donors of one rank, alpha and set of target modules; use method: exact")
