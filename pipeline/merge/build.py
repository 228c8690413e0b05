"""Recipes -> adapters on disk. Donors are fetched and read once for all recipes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.adapters.adapter import Adapter, Indexed, hash_of, read_indexed, write_adapter
from pipeline.core.errors import AdapterError
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.merge.recipes import CPU, Recipe, merge
from pipeline.model.base_model import device, linear_shapes


@dataclass(frozen=True)
class Built:
    """A merged adapter: the share of its energy that it kept, and its adapter_hash."""

    kept: float
    hash: str


def build(
    recipes: Mapping[str, Recipe],
    indexed: Mapping[str, Indexed],
    base: str,
    target: Folder,
    alpha: float | None = None,
    on: torch.device = CPU,
) -> tuple[dict[str, Built], dict[str, str]]:
    """Merge each recipe into the folder of its name under `target`.

    Args:
        indexed: where each donor lies, and its hash as indexed.
        alpha: of the results; by default that which gives the scale of the first donor.
        on: which device. Not a GPU unless Ray gave it to this process: engines take all of its memory.

    Returns:
        What was built, and for each recipe that its method refuses the reason.

    Raises:
        AdapterError: a donor cannot be read, or is another adapter by now than the one that was scored.
    """
    shapes, _ = linear_shapes(base)
    built: dict[str, Built] = {}
    refused: dict[str, str] = {}
    with temporary_folder() as cache:
        donors = _read_donors(recipes, indexed, cache, base)
        for name, recipe in recipes.items():
            try:
                merged = merge(recipe, [donors[donor] for donor in recipe.donors], base, shapes, alpha=alpha, on=on)
            except AdapterError as error:
                refused[name] = str(error)
                continue
            built[name] = Built(merged.kept_energy, store(merged.adapter, target, name, base))
    return built, refused


def build_on_device(
    recipes: Mapping[str, Recipe], indexed: Mapping[str, Indexed], base: str, target: Folder
) -> tuple[dict[str, Built], dict[str, str]]:
    """As `build`, on the device that Ray gave to this process."""
    return build(recipes, indexed, base, target, on=device())


def store(adapter: Adapter, target: Folder, name: str, base: str) -> str:
    """Write an adapter of a base into the folder `name` under `target`. Returns its adapter_hash."""
    with temporary_folder() as scratch:
        write_adapter(scratch, adapter, base=base)
        target.upload(scratch, name)
        return hash_of(scratch)


def _read_donors(recipes: Mapping[str, Recipe], indexed: Mapping[str, Indexed], cache: Path, base: str) -> dict[str, Adapter]:
    wanted = {donor for recipe in recipes.values() for donor in recipe.donors}
    return {donor: read_indexed(indexed[donor], cache, base) for donor in sorted(wanted)}
