"""Losses of completions under a transformers causal LM: the output head runs only where a token counts, and what all rows of a
batch begin with, such as the system prompt of a chat template, is computed once.

The head is the model's own: many scale or cap their logits, each in its way. A model of which it is not proven that it can be run
in two steps, decoder and head, is run whole.

Shapes: B rows, T tokens, P of them shared, N positions that count, H hidden features, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.model.rope import depends_on_length, turned_alone

Head = Callable[[Tensor], Tensor]

PROVEN = "_mashup_decoder"
"""Attribute of a model in which `decoder_of` keeps what it found, in a tuple."""

PROOF_TOKENS, PROOF_SHARED, PROOF_WORDS = 10, 6, 200
"""Of the two rows that a decoder is proven on: tokens of each, of which so many are the same, and token ids."""

APART, APART_IN_16_BITS = 1e-3, 3e-2
"""Of the logits' spread, by which half of them may differ at most; in 16 bits matrix products of other shapes round otherwise."""

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
    lengths: tuple[int, ...]
    """Of the rows, without padding."""
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
    return Batch(copied_to(device, ids_BT), copied_to(device, index_N), tuple(map(len, ids)), _shared(ids_BT, mask_BT))


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host's on a device. A GPU copies while the host goes on, out of memory that stays where it is (pinned)."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class _Given(BaseModelOutputWithPast):
    """What a decoder gives; what else a model asks it for, such as the choices of its routers, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def completion_logits(model: Any, batch: Batch) -> Tensor:
    """Logits in float32 for the positions that predict a token which counts, row after row; shape (N, V).

    `model` is a transformers causal LM, its LoRA layers injected or not.
    """
    return torch.cat([head(values) for head, values, _ in _chunks(model, batch)])


def completion_nll(model: Any, batch: Batch) -> Tensor:
    """-log p of each token that counts, shape (N,); differentiable.

    Never more than LOGITS logits are held: where there are more, they are made in chunks, and anew for the gradient. A model
    that is run whole gives all at once.
    """
    chunks = _chunks(model, batch)
    if len(chunks) == 1:
        return _nll(*chunks[0])
    again = partial(checkpoint, _nll, use_reentrant=False, preserve_rng_state=False)  # a head draws no numbers
    return torch.cat([again(*chunk) for chunk in chunks])


def completion_targets(batch: Batch) -> Tensor:
    """The tokens that count, in the order of `completion_logits`; shape (N,)."""
    return batch.ids_BT.flatten()[batch.index_N]


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers, and training goes on with it
def score_tokens(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """-log p of each token that counts, and whether it was the model's first choice; each (N,)."""
    nll, hit = [], []
    for head, hidden_NH, target_N in _chunks(model, batch):
        logits_NV = head(hidden_NH)
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


def _chunks(model: Any, batch: Batch) -> list[tuple[Head, Tensor, Tensor]]:
    """What makes logits (N, V) in float32, of which values, and the targets (N,), for at most LOGITS logits at a time."""
    decoder, size = decoder_of(model), max(1, LOGITS // int(model.config.get_text_config().vocab_size))
    if decoder is None:
        head, values = Tensor.float, _whole_logits(model, batch)
    else:
        head, values = partial(_own_logits, model, decoder), _hidden(decoder, batch)
    return [(head, *chunk) for chunk in zip(values.split(size), completion_targets(batch).split(size), strict=True)]


def _shared(ids_BT: Tensor, mask_BT: Tensor) -> int:
    alike = int((ids_BT == ids_BT[:1]).all(dim=0).long().cumprod(dim=0).sum())
    before = int((~mask_BT.any(dim=0)).long().cumprod(dim=0).sum()) - 1
    return min(alike, before)


def _hidden(decoder: Any, batch: Batch) -> Tensor:
    """Last hidden states at the positions that predict a token which counts; shape (N, H)."""
    start = batch.n_shared
    cache = _shared_cache(decoder, batch)
    if cache is None:
        start = 0
        with turned_alone(decoder, batch.lengths):
            hidden_BTH = decoder(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    else:
        hidden_BTH = decoder(input_ids=batch.ids_BT[:, start:], past_key_values=cache, use_cache=True).last_hidden_state
    before_N = batch.index_N - 1 - start * (batch.row_N + 1)  # of each the token before it, without what is shared
    return hidden_BTH.flatten(0, 1).index_select(0, before_N)


def _shared_cache(decoder: Any, batch: Batch) -> DynamicCache | None:
    """Keys and values of the tokens that all rows begin with, of every layer and for each row. Gradients flow through them.

    None: they are too few, or the model keeps something else than keys and values, as state-space models do, or keeps nothing,
    as with gradient checkpointing, or its keys depend on what comes behind them.
    """
    rows = len(batch.ids_BT)
    if not sharing_pays(rows, batch.n_shared, batch.ids_BT.device):
        return None
    return _cache_of(decoder, batch.ids_BT, batch.n_shared)


def _cache_of(decoder: Any, ids_BT: Tensor, n_shared: int) -> DynamicCache | None:
    cache = DynamicCache(config=decoder.config)
    if not _keeps_keys_and_values(decoder, cache):
        return None
    decoder(input_ids=ids_BT[:1, :n_shared], past_key_values=cache, use_cache=True)
    if any(layer.get_seq_length() != n_shared for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(len(ids_BT))
    return cache


def sharing_pays(rows: int, n_shared: int, device: torch.device) -> bool:
    """Whether so many rows that begin with so many equal tokens are faster with these computed once."""
    return (rows - 1) * n_shared >= SHARED and (device.type != "cuda" or n_shared >= SHARED_ON_GPU)


def _keeps_keys_and_values(decoder: Any, cache: DynamicCache) -> bool:
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    if depends_on_length(decoder.config):
        return False
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


@torch.no_grad()
def may_share_batches(model: Any) -> bool:
    """Whether rows that are continued in a batch, the shorter ones behind padding that is masked, are continued as each is alone.

    So with keys and values of attention alone. A state takes padding in, mask or not, under many architectures, and RWKV's under
    transformers mixes even rows of one length. Where keys depend on what comes behind them, they depend on the other rows.
    """
    decoder = decoder_of(model)
    return decoder is not None and _cache_of(decoder, torch.ones(1, 1, dtype=torch.long, device=model.device), 1) is not None


def decoder_of(model: Any) -> Any | None:
    """The part of a model that turns tokens into its last hidden states, so that its head can run apart. None: there is none of
    which this is proven, and the model is used whole. To be asked before the model's weights are shared out."""
    if (known := model.__dict__.get(PROVEN)) is None:
        named = [model.get_decoder()] if hasattr(model, "get_decoder") else []  # of some it is the whole model
        parts = [part for part in (*named, *model.children()) if part is not model]
        found = next((part for part in parts if _is_proven(model, part)), None)
        if found is None:
            logging.getLogger(__name__).warning("%s is run whole for each loss, which is slow", type(model).__name__)
        known = model.__dict__[PROVEN] = (found,)  # not by setattr: what is a module would become one of its parts
    return known[0]


@torch.no_grad()
def _is_proven(model: Any, decoder: Any) -> bool:
    """Whether the logits of a few rows, made in two steps, are those that the model gives; also where what the rows begin with is
    computed once, if it can be for this model."""
    training = model.training
    model.eval()
    try:
        words = min(PROOF_WORDS, int(model.config.get_text_config().vocab_size))
        ids_BT = torch.arange(2 * PROOF_TOKENS).reshape(2, -1).remainder(words - 1).add(1).to(model.device)
        ids_BT[:, :PROOF_SHARED] = ids_BT[0, :PROOF_SHARED]
        expected_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        whole_BTH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        if not _are_alike(model, _own_logits(model, decoder, whole_BTH.flatten(0, 1)), expected_BTV.flatten(0, 1)):
            return False
        cache = _cache_of(decoder, ids_BT, PROOF_SHARED)
        if cache is None:
            return True
        rest_BTH = decoder(input_ids=ids_BT[:, PROOF_SHARED:], past_key_values=cache, use_cache=True).last_hidden_state
        found_NV = _own_logits(model, decoder, rest_BTH.flatten(0, 1))
        return _are_alike(model, found_NV, expected_BTV[:, PROOF_SHARED:].flatten(0, 1))
    except Exception:
        return False
    finally:
        model.train(training)


def _are_alike(model: Any, found_NV: Tensor, expected_NV: Tensor) -> bool:
    """By medians: of logits that a model masks the spread is none, and a rounding that flips an expert moves few."""
    spread = (expected_NV - expected_NV.median()).abs().median()
    apart = (found_NV.to(expected_NV.device) - expected_NV).abs().median()
    return bool(apart <= (APART if _products(model) == torch.float32 else APART_IN_16_BITS) * spread)


def _products(model: Any) -> torch.dtype:
    """The type that a model's matrix products are made in: layers in 4 bits have one of their own."""
    bits = getattr(model.config, "quantization_config", None)
    found: torch.dtype = bits.bnb_4bit_compute_dtype if bits else model.dtype
    return found


def _own_logits(model: Any, decoder: Any, hidden_NH: Tensor) -> Tensor:
    """The logits that the model itself makes of last hidden states, with its scales and caps, in float32: its own forward pass,
    in which the decoder is one that gives these."""
    output = _Given(last_hidden_state=hidden_NH[None])
    decoder.__dict__["_call_impl"] = lambda *args, **settings: output  # without hooks: nothing is computed in it
    try:
        nothing = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        logits_NV: Tensor = model(input_ids=nothing, use_cache=False).logits[0].float()
    finally:
        del decoder.__dict__["_call_impl"]
    return logits_NV


def _whole_logits(model: Any, batch: Batch) -> Tensor:
    """The logits of a whole forward pass at the positions that predict a token which counts; shape (N, V)."""
    with turned_alone(model, batch.lengths):
        logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
    found: Tensor = logits_BTV.flatten(0, 1).index_select(0, batch.index_N - 1)
    return found


def _nll(head: Head, values: Tensor, target_N: Tensor) -> Tensor:
    return cross_entropy(head(values), target_N, reduction="none")
