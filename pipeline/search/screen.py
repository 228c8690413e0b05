"""The cheap screen: what each donor would do to the loss, to first order, without one forward pass of the donor.

A backward pass of the base on the samples gives G = dL/dW for each linear layer that the pool adapts; a donor's delta weight
D = s B A then changes the loss by about <G, D>, which is one thin matrix product a layer. Nothing uses it by default: how far
the estimate agrees with true losses stands in benchmarks/results/README.md under "Screen".

Shapes: R rank of an adapter, O out features, I in features of a linear layer.
"""

import warnings
from collections.abc import Collection
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adapters.adapter import Adapter, read_adapter
from pipeline.adapters.cache import AdapterCache
from pipeline.cluster.resources import compute_task
from pipeline.core.errors import AdapterError
from pipeline.model.base_model import device, fast_dtype, linear_shapes, load_model
from pipeline.model.completion_loss import collate, completion_nll, length_batches

Gradients = dict[str, Tensor]
"""Module path -> G_OI in float32, nats a completion token for a unit of weight."""

BATCH_TOKENS = 1024
"""Padded tokens in one backward pass, whose activations are all kept."""

ADAPTERS_PER_TASK = 8

SCREEN = pa.schema(
    [
        ("adapter_id", pa.string()),
        ("first_order", pa.float64()),  # estimated NLL minus the base's, nats a completion token; null: it could not be read
    ]
)


def weight_gradients(model: Any, samples: pa.Table, modules: Collection[str]) -> Gradients:
    """Gradient of the base's mean completion NLL with respect to the weights of linear layers.

    G = dL/dW with L = sum_t -log p(t) / n over the n completion tokens of all rows; sums are kept and divided once.

    Args:
        model: a transformers causal LM; afterwards just the weights of `modules` have `requires_grad`.
        samples: of schema `tables.SAMPLES`.
        modules: paths of linear layers, e.g. model.layers.0.self_attn.q_proj.
    """
    model.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in modules}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for name, weight in weights.items()}
    ids, masks = samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist()
    n_tokens = 0
    for places in length_batches([len(row) for row in ids], BATCH_TOKENS):
        batch = collate([ids[p] for p in places], [masks[p] for p in places], device())
        nll = completion_nll(model, batch).sum()
        # Zeros stand for a layer that no token reached, such as an expert of a mixture.
        parts = torch.autograd.grad(nll, list(weights.values()), materialize_grads=True)
        for name, part in zip(weights, parts, strict=True):
            sums[name] += part
        n_tokens += batch.n_tokens
    return {name: total / n_tokens for name, total in sums.items()}


def first_order(gradients: Gradients, adapter: Adapter) -> float:
    """Estimated change of the mean completion NLL when an adapter is put on the base, in nats a token.

    Taylor expansion of the loss at the base's weights W, over the adapted layers m:
        L(W + D) - L(W) = sum_m <G_m, D_m> + O(|D|^2),    D_m = s_m B_m A_m,
        <G, s B A> = sum((s B^T G) * A), so that D, of shape (O, I), is never formed.
    """
    total = 0.0
    for module in adapter.modules:
        delta = adapter.factors(module)
        total += float(((delta.b_OR.T @ gradients[module]) * delta.a_RI).sum())
    return total


def screen_pool(catalogue: pa.Table, base: str, samples: pa.Table, dtype: str = "auto") -> pa.Table:
    """Estimate every adapter's effect on the samples: one backward pass in a Ray task, then a stream of adapters by Ray Data.

    Args:
        catalogue: columns adapter_id, uri and target_modules of schema `tables.CATALOGUE`.
        samples: of schema `tables.SAMPLES`.
        dtype: of the base in the backward pass; 'auto' is what the device is fast at.

    Returns:
        A table of schema SCREEN, sorted by adapter_id. An adapter that cannot be read or does not fit has a null.
    """
    modules = touched_modules(base, catalogue["target_modules"].to_pylist())
    # What a task returns lies in the object store, once; the driver holds no more than the reference.
    gradients = compute_task(_gradients).remote(base, dtype, samples, modules)
    ray.wait([gradients], fetch_local=False)
    rows = (
        ray.data.from_arrow(catalogue.select(["adapter_id", "uri"]))
        .repartition(target_num_rows_per_block=ADAPTERS_PER_TASK)
        .map_batches(_screen_batch, batch_format="pyarrow", fn_kwargs={"gradients": gradients})
    )
    parts = list(rows.iter_batches(batch_format="pyarrow", batch_size=None))
    return pa.concat_tables([SCREEN.empty_table(), *parts]).sort_by("adapter_id")


def touched_modules(base: str, target_modules: Collection[Collection[str] | None]) -> list[str]:
    """Paths of the base's linear layers that some adapter adapts, the output head apart."""
    leaves = {leaf for row in target_modules for leaf in row or ()}
    shapes, head = linear_shapes(base)
    return [name for name in shapes if name != head and name.rpartition(".")[2] in leaves]


def _gradients(base: str, dtype: str, samples: pa.Table, modules: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """Numpy arrays, which workers map from the object store; tensors would be copied into each."""
    model = load_model(base, fast_dtype(dtype))
    return {name: gradient.cpu().numpy() for name, gradient in weight_gradients(model, samples, modules).items()}


def _screen_batch(batch: pa.Table, gradients: ray.ObjectRef) -> pa.Table:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        mapped = {name: torch.from_numpy(gradient) for name, gradient in ray.get(gradients).items()}
    with closing(AdapterCache()) as cache:
        cache.prefetch(batch["uri"].to_pylist())
        values = [_estimate(uri, mapped, cache) for uri in batch["uri"].to_pylist()]
    return pa.table([batch["adapter_id"], pa.array(values, pa.float64())], schema=SCREEN)


def _estimate(uri: str, gradients: Gradients, cache: AdapterCache) -> float | None:
    try:
        with cache.lease(uri) as folder:
            adapter = read_adapter(folder, {name: (g.shape[0], g.shape[1]) for name, g in gradients.items()})
    except AdapterError:
        return None
    return first_order(gradients, adapter)
