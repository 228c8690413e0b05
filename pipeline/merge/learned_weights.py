"""Which donors and which weights, learned on the search sample, the base and the donors frozen.

Shapes: K donors, M modules that any of them adapts, in the order of their names, R ranks of all donors that adapt a module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from pipeline.adapters.adapter import Adapter, Indexed, read_indexed
from pipeline.core.node_folder import temporary_folder
from pipeline.model.base_model import device, fast_dtype, load_model
from pipeline.model.completion_loss import collate, completion_nll
from pipeline.model.length_batches import length_batches

STEPS, ROWS, RATE = 24, 4, 0.1
"""Of Adam: steps, samples a step, and its rate. More samples a step found no better weights."""

BATCH_TOKENS, FEWEST_TOKENS = 2048, 128
"""Padded tokens in one forward and backward pass, and of the smallest that is tried where memory is short."""

Found = TypeVar("Found")


def learn_weights(
    base: str, donors: Sequence[Indexed], samples: pa.Table, by_module: bool = False, dtype: str = "auto"
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]] | None]:
    """Weights of the donors in an exact merge that have a low loss on the samples, found from equal ones by Adam.

    Zero and negative weights are allowed, so that a donor can be left out or taken away, and their sum is free: the size of the
    start is learned too. LoraHub (arXiv 2307.13269) searches such weights without gradients.

    Args:
        donors: where each lies, and its hash as indexed.
        samples: of schema `tables.SAMPLES`; the loss is the mean NLL of their completion tokens.
        by_module: go on from the weights of the donors, with a weight for each donor in each module.

    Returns:
        One weight a donor, and where asked for one a donor in each module (arXiv 2310.02575 learns such ones without labels).

    Raises:
        AdapterError: a donor cannot be read.
    """
    model, weights_MK, modules = _model_with_donors(base, donors, dtype)
    equal_K = weights_MK[0].clone()
    found_K = _in_fitting_passes(lambda tokens: _descend(model, samples, equal_K, weights_MK, tokens))
    weights = tuple(found_K.tolist())
    if not by_module:
        return weights, None
    shared_MK = found_K.expand_as(weights_MK)
    found_MK = _in_fitting_passes(lambda tokens: _descend(model, samples, shared_MK, weights_MK, tokens))
    return weights, {module: tuple(row) for module, row in zip(modules, found_MK.tolist(), strict=True)}


def greedy_donors(base: str, donors: Sequence[Indexed], samples: pa.Table, dtype: str = "auto") -> tuple[int, ...]:
    """Indices of the donors whose equal mix has a low loss on the samples, by forward selection: from the first donor on, the
    one that lowers the loss most is added, until none does.

    Raises:
        AdapterError: a donor cannot be read.
    """
    model, weights_MK, _ = _model_with_donors(base, donors, dtype)

    def loss(chosen: Iterable[int]) -> float:
        columns = list(chosen)
        with torch.no_grad():
            weights_MK.zero_()
            weights_MK[:, columns] = 1 / len(columns)
            nothing = torch.zeros((), dtype=torch.float64, device=device())
            return float(_in_fitting_passes(lambda tokens: sum(_losses(model, samples, tokens), nothing)))

    kept: tuple[int, ...] = (0,)
    best = loss(kept)
    while rivals := {k: loss([*kept, k]) for k in range(len(donors)) if k not in kept}:
        k = min(rivals, key=lambda one: rivals[one])
        if rivals[k] >= best:
            break
        kept, best = (*kept, k), rivals[k]
    return kept


def add_donors(model: Any, donors: Sequence[Adapter], weights_MK: Tensor) -> list[str]:
    """Let each linear layer m that donors adapt add sum_k w_mk x A_k^T B_k^T to its output, and to each weight m that they change
    whole be added w_mk times their changes; differentiable in the weights.

    Returns:
        The modules, in the order of the weights' rows; a weight that is changed whole is one, too.
    """
    modules, whole = _modules(donors), set().union(*(donor.whole for donor in donors))
    for row, module in enumerate(modules):
        if module in whole:
            _add_whole(model, module, donors, weights_MK, row)
            continue
        layer = model.get_submodule(module)
        having = [(k, donor.factors(module)) for k, donor in enumerate(donors) if module in donor.tensors]
        k_R = torch.cat([torch.full((factors.rank,), k) for k, factors in having])
        a_RI = torch.cat([factors.a_RI for _, factors in having])
        b_OR = torch.cat([factors.b_OR for _, factors in having], dim=1)
        # All that the layer needs lies where it is: an index of the host's would be copied in every pass, and waited for.
        k_R = k_R.to(layer.weight.device)
        layer.register_forward_hook(_adding(a_RI.to(layer.weight), b_OR.to(layer.weight), k_R, weights_MK, row))
    return modules


def _adding(a_RI: Tensor, b_OR: Tensor, k_R: Tensor, weights_MK: Tensor, row: int) -> Callable[..., Tensor]:
    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + ((inputs[0] @ a_RI.T) * weights_MK[row][k_R].to(a_RI.dtype)) @ b_OR.T

    return hook


class _Changed(nn.Module):
    """A weight with weighted changes; see torch.nn.utils.parametrize."""

    def __init__(self, changes: dict[int, Tensor], weights_MK: Tensor, row: int) -> None:
        super().__init__()
        self.changes, self.weights_MK, self.row = changes, weights_MK, row

    def forward(self, own: Tensor) -> Tensor:
        return own + sum(self.weights_MK[self.row, k].to(own.dtype) * change for k, change in self.changes.items())


def _add_whole(model: Any, name: str, donors: Sequence[Adapter], weights_MK: Tensor, row: int) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    changes = {k: donor.whole[name].to(getattr(module, leaf)) for k, donor in enumerate(donors) if name in donor.whole}
    register_parametrization(module, leaf, _Changed(changes, weights_MK, row))


def _modules(donors: Sequence[Adapter]) -> list[str]:
    return sorted(set().union(*(donor.tensors for donor in donors), *(donor.whole for donor in donors)))


def _model_with_donors(base: str, indexed: Sequence[Indexed], dtype: str) -> tuple[Any, Tensor, list[str]]:
    """The frozen base with the donors in equal parts, their weights (M, K), and the modules."""
    with temporary_folder() as cache:
        donors = [read_indexed(one, cache, base) for one in indexed]
    model = load_model(base, fast_dtype(dtype)).requires_grad_(False)
    weights_MK = torch.full((len(_modules(donors)), len(donors)), 1 / len(donors), device=device())
    return model, weights_MK, add_donors(model, donors, weights_MK)


def _in_fitting_passes(compute: Callable[[int], Found]) -> Found:
    """What `compute` gives for so many tokens a pass as the device's memory holds."""
    tokens = BATCH_TOKENS
    while True:
        with suppress(torch.OutOfMemoryError) if tokens > FEWEST_TOKENS else nullcontext():
            return compute(tokens)
        torch.cuda.empty_cache()
        tokens //= 2


def _descend(model: Any, samples: pa.Table, start: Tensor, weights_MK: Tensor, tokens: int) -> Tensor:
    """Adam from `start` on, which is broadcast to the weights that the model uses, on a few samples a step, round after round.
    Gives the mean over the last quarter of the steps, as single ones are noisy (Polyak and Juditsky, 1992)."""
    free = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE)
    rows, found = min(ROWS, len(samples)), []
    for step in range(STEPS):
        optimizer.zero_grad()
        weights_MK.detach_().copy_(free.expand_as(weights_MK))
        for nll in _losses(model, samples.take([row % len(samples) for row in range(step * rows, (step + 1) * rows)]), tokens):
            nll.backward()
        optimizer.step()
        found.append(free.detach().clone())
    return torch.stack(found[-STEPS // 4 :]).mean(dim=0)


def _losses(model: Any, samples: pa.Table, tokens: int = BATCH_TOKENS) -> Iterator[Tensor]:
    """Batch of so many padded tokens after batch, its share of the mean NLL of all completion tokens."""
    ids, masks = samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist()
    n_tokens = sum(sum(mask[1:]) for mask in masks)
    for rows in length_batches([len(row) for row in ids], tokens):
        batch = collate([ids[row] for row in rows], [masks[row] for row in rows], device())
        yield completion_nll(model, batch).sum() / n_tokens
