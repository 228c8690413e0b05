"""Weights of a merge, learned on the search sample: gradient steps on one number a donor, the base and the donors frozen.

Zero and negative weights are allowed, so that a donor can be left out or taken away. LoraHub (arXiv 2307.13269) searches the same
weights without gradients.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.basemodel import device, fast_dtype, load_model
from pipeline.engines.completion import collate, completion_logits, completion_targets, length_batches
from pipeline.fetch import fetch_adapter
from pipeline.merge.adapter import Adapter, read_adapter

STEPS, RATE = 12, 0.1
BATCH_TOKENS = 2048
"""Padded tokens in one forward and backward pass."""


def learn_weights(base: str, uris: Sequence[str], samples: pa.Table, dtype: str = "auto") -> tuple[float, ...]:
    """Weights of the donors in an exact merge that have the lowest loss on the samples, found from equal ones by Adam.

    Args:
        samples: of schema `tables.SAMPLES`; the loss is the mean NLL of their completion tokens.

    Returns:
        Of all steps the weights of the lowest loss, so that they are never worse on the samples than equal ones.

    Raises:
        AdapterError: a donor cannot be read.
    """
    with TemporaryDirectory() as cache:
        donors = [read_adapter(fetch_adapter(uri, Path(cache))) for uri in uris]
    model = load_model(base, fast_dtype(dtype)).requires_grad_(False)
    weights_K = torch.full((len(donors),), 1 / len(donors), device=device(), requires_grad=True)
    add_donors(model, donors, weights_K)
    optimizer = torch.optim.Adam([weights_K], lr=RATE)
    best, found = float("inf"), tuple(weights_K.tolist())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model, samples)
        if loss < best:
            best, found = loss, tuple(weights_K.tolist())
        optimizer.step()
    return found


def add_donors(model: Any, donors: Sequence[Adapter], weights_K: Tensor) -> None:
    """Let each linear layer that donors adapt add sum_k w_k x A_k^T B_k^T to its output; differentiable in the weights."""
    for module in sorted(set().union(*(donor.tensors for donor in donors))):
        layer = model.get_submodule(module)
        having = [(place, donor.factors(module)) for place, donor in enumerate(donors) if module in donor.tensors]
        place_R = torch.cat([torch.full((factors.rank,), place) for place, factors in having])
        a_RI = torch.cat([factors.a_RI for _, factors in having])
        b_OR = torch.cat([factors.b_OR for _, factors in having], dim=1)
        layer.register_forward_hook(_adding(a_RI.to(layer.weight), b_OR.to(layer.weight), place_R, weights_K))


def _adding(a_RI: Tensor, b_OR: Tensor, place_R: Tensor, weights_K: Tensor) -> Callable[..., Tensor]:
    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + ((inputs[0] @ a_RI.T) * weights_K[place_R].to(a_RI.dtype)) @ b_OR.T

    return hook


def _loss(model: Any, samples: pa.Table) -> float:
    """Mean NLL of the completion tokens; its gradient is added up in the weights, batch after batch."""
    ids, masks = samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist()
    n_tokens = sum(sum(mask[1:]) for mask in masks)
    total = 0.0
    for places in length_batches([len(row) for row in ids], BATCH_TOKENS):
        batch = collate([ids[p] for p in places], [masks[p] for p in places], device())
        nll = cross_entropy(completion_logits(model, batch), completion_targets(batch), reduction="sum") / n_tokens
        nll.backward()
        total += nll.item()
    return total
