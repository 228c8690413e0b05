"""Layers of a model in memory, changed whole: what adapters save beside their factors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import AdapterError


def add_to_weights(model: Any, changes: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Put the sum of a weight and a change in the weight's place, for each of these names. Weights that are one, as those of an
    embedding and of a head that is tied to it, stay one where their changes are equal.

    Returns:
        The weights that were there before.

    Raises:
        AdapterError: a weight is quantised; nothing is changed then.
    """
    before: dict[str, nn.Parameter] = {name: model.get_parameter(name) for name in changes}
    if whole := [name for name, weight in before.items() if not weight.is_floating_point()]:
        raise AdapterError(f"it replaces {whole[0]}, which is quantised here: use merge.method: fold, or train.quantize: none")
    put = list[tuple[str, nn.Parameter]]()
    for name, change in changes.items():
        own = before[name]
        value = (own.detach().float() + change.to(own.device)).to(own.dtype)
        same = [there for other, there in put if before[other] is own and torch.equal(there, value)]
        put.append((name, same[0] if same else nn.Parameter(value, requires_grad=own.requires_grad)))
    for name, weight in put:
        _set(model, name, weight)
    return before


@contextmanager
def changed(model: Any, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, weights of a model are changed as by `add_to_weights`."""
    before = add_to_weights(model, changes)
    try:
        yield
    finally:
        for name, weight in before.items():
            _set(model, name, weight)


def _set(model: Any, name: str, weight: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, weight)
