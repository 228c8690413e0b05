"""Losses of completions under a transformers causal LM: the output head runs only where a token counts, and what all rows of a
batch begin with, such as the system prompt of a chat template, is computed once.

Shapes: B rows, T tokens, P of them shared, N positions that count, H hidden features, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LOGITS = 1 << 25
"""Logits held at a time in training and scoring: 128 MB in float32."""

SHARED = 64
"""Tokens that sharing must save in a batch; it takes a second, small pass through the model."""

SHARED_ON_GPU = 512
"""Tokens that rows must share besides for it to pay on a GPU, where they lose flash attention by it: their queries are then fewer
than their keys, for which transformers builds a whole mask and repeats keys and values. To be measured."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: under causal attention padding then reaches no token that counts, so no mask is needed."""

    ids_BT: Tensor
    index_N: Tensor
    """Where the tokens that count are in `ids_BT`, read row after row: found where the rows are made, as to look for them on a
    GPU would make the host wait for it."""
    n_shared: int = 0
    """P: all rows begin with the same P tokens, none of which counts or predicts one that does."""

    @property
    def n_tokens(self) -> int:
        """How many tokens count."""
        return len(self.index_N)

    @property
    def row_N(self) -> Tensor:
        """The row of each token that counts, in the order of `completion_logits`."""
        return self.index_N // self.ids_BT.shape[1]


def collate(ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], device: torch.device) -> Batch:
    """Pad rows to the longest of them. A row's first token has nothing before it and never counts."""
    width = max(len(row) for row in ids)
    ids_BT = torch.zeros(len(ids), width, dtype=torch.long)
    mask_BT = torch.zeros(len(ids), width, dtype=torch.bool)
    for i, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        ids_BT[i, : len(row)] = torch.tensor(row)
        mask_BT[i, : len(row)] = torch.tensor(mask)
    mask_BT[:, 0] = False
    index_N = mask_BT.flatten().nonzero()[:, 0]
    return Batch(copied_to(device, ids_BT), copied_to(device, index_N), _shared(ids_BT, mask_BT))


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host's on a device. A GPU copies while the host goes on, out of memory that stays where it is (pinned)."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def completion_logits(model: Any, batch: Batch) -> Tensor:
    """Logits in float32 for the positions that predict a token which counts, row after row; shape (N, V).

    `model` is a transformers causal LM, its LoRA layers injected or not. The models of the Hub that rescale their logits do
    it by a config field: Gemma 2 (soft cap), Cohere and Granite (factors).
    """
    return _logits(model, _hidden(model, batch))


def completion_nll(model: Any, batch: Batch) -> Tensor:
    """-log p of each token that counts, shape (N,); differentiable.

    Never more than LOGITS logits are held: where there are more, they are made in chunks, and anew for the gradient.
    """
    chunks = _chunks(model, batch)
    if len(chunks) == 1:
        return _nll(model, *chunks[0])
    again = partial(checkpoint, _nll, model, use_reentrant=False, preserve_rng_state=False)  # a head draws no numbers
    return torch.cat([again(*chunk) for chunk in chunks])


def completion_targets(batch: Batch) -> Tensor:
    """The tokens that count, in the order of `completion_logits`; shape (N,)."""
    return batch.ids_BT.flatten()[batch.index_N]


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers, and training goes on with it
def score_tokens(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """-log p of each token that counts, and whether it was the model's first choice; each (N,)."""
    nll, hit = [], []
    for hidden_NH, target_N in _chunks(model, batch):
        logits_NV = _logits(model, hidden_NH)
        nll.append(cross_entropy(logits_NV, target_N, reduction="none").double())
        hit.append(logits_NV.argmax(dim=-1) == target_N)
    return torch.cat(nll), torch.cat(hit)


def score_rows(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: sum of -log p over the tokens that count, their number, and how many were the first choice; each (B,)."""
    nll_N, hit_N = score_tokens(model, batch)
    zero_B = torch.zeros(len(batch.ids_BT), dtype=torch.float64, device=nll_N.device)
    ones_N = torch.ones_like(nll_N)
    sums = [zero_B.index_add(0, batch.row_N, values) for values in (nll_N, ones_N, hit_N.double())]
    nll_B, count_B, hit_B = torch.stack(sums).cpu()  # one wait for the device
    return nll_B, count_B, hit_B


def _chunks(model: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Last hidden states (N, H) and targets (N,), so many at a time that they make at most LOGITS logits."""
    size = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    return list(zip(_hidden(model, batch).split(size), completion_targets(batch).split(size), strict=True))


def _shared(ids_BT: Tensor, mask_BT: Tensor) -> int:
    alike = int((ids_BT == ids_BT[:1]).all(dim=0).long().cumprod(dim=0).sum())
    before = int((~mask_BT.any(dim=0)).long().cumprod(dim=0).sum()) - 1
    return min(alike, before)


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Last hidden states at the positions that predict a token which counts; shape (N, H)."""
    decoder, start = model.get_decoder(), batch.n_shared
    cache = _shared_cache(decoder, batch)
    if cache is None:
        start, hidden_BTH = 0, decoder(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    else:
        hidden_BTH = decoder(input_ids=batch.ids_BT[:, start:], past_key_values=cache, use_cache=True).last_hidden_state
    before_N = batch.index_N - 1 - start * (batch.row_N + 1)  # of each the token before it, without what is shared
    return hidden_BTH.flatten(0, 1).index_select(0, before_N)


def _shared_cache(decoder: Any, batch: Batch) -> DynamicCache | None:
    """Keys and values of the tokens that all rows begin with, of every layer and for each row. Gradients flow through them.

    None: they are too few, or the model keeps something else than keys and values, as state-space models do, or keeps nothing,
    as with gradient checkpointing.
    """
    rows = len(batch.ids_BT)
    if not sharing_pays(rows, batch.n_shared, batch.ids_BT.device):
        return None
    cache = DynamicCache(config=decoder.config)
    if not _keeps_keys_and_values(decoder, cache):
        return None
    decoder(input_ids=batch.ids_BT[:1, : batch.n_shared], past_key_values=cache, use_cache=True)
    if any(layer.get_seq_length() != batch.n_shared for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(rows)
    return cache


def sharing_pays(rows: int, n_shared: int, device: torch.device) -> bool:
    """Whether so many rows that begin with so many equal tokens are faster with these computed once."""
    return (rows - 1) * n_shared >= SHARED and (device.type != "cuda" or n_shared >= SHARED_ON_GPU)


def _keeps_keys_and_values(decoder: Any, cache: DynamicCache) -> bool:
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def _logits(model: Any, hidden_NH: Tensor) -> Tensor:
    logits_NV = model.get_output_embeddings()(hidden_NH).float()
    config = model.config
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_NV = cap * torch.tanh(logits_NV / cap)
    if factor := getattr(config, "logit_scale", None):
        logits_NV = logits_NV * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits_NV = logits_NV / divisor
    return logits_NV


def _nll(model: Any, hidden_NH: Tensor, target_N: Tensor) -> Tensor:
    return cross_entropy(_logits(model, hidden_NH), target_N, reduction="none")
