"""Whole layers that are saved beside an adapter's factors: the base's own say nothing; of trained ones the change is read.

PEFT saves embeddings and output heads where it thinks that the vocabulary has grown, what `modules_to_save` names, and rows of
an embedding that `trainable_token_indices` names; other trainers save whatever is in the model. LoRA under vLLM knows none of
these; the transformers engine, merges and training add the change to the base's own weights. So they do with what factors on an
embedding or an output head change there, which vLLM does not know either.
"""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.adapters.tensor_names import TOKEN_ROWS, adapted_beside, factor_beside, saved_whole
from pipeline.adapters.validation import Declared, open_weights
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.model.base_model import stored_embedding, stored_weights, tied_weights, weight_name
from pipeline.model.layer_names import EMBEDDING_NAMES, HEADS, is_of_text, own_name

MOST_NAMED = 3
"""Layers that are named where several were saved."""

CARRIES_WHOLE = "transformers"
"""The engine that scores adapters with whole layers."""


def trained_layers(folder: Path, declared: Declared, base: str) -> dict[str, Tensor]:
    """What training changed in the layers that an adapter saves whole, by the names that the base gives their weights: float32,
    of the shape of the base's. Rows of new tokens, which no text of ours has, are passed over.

    Raises:
        AdapterError: the base has no such layer, it is one that no text runs through, or the adapter has factors on it, too.
    """
    if not declared.saved:
        return {}
    found: dict[str, Tensor] = {}
    whole = [name for name in declared.saved if not factor_beside(name)]
    with open_weights(folder / WEIGHTS_FILE) as file:
        for name in sorted(whole, key=lambda one: bool(TOKEN_ROWS.search(one))):  # rows go over what is saved whole
            one = _saved(name, file, declared, base)
            if one is not None:
                change = one.values.float() - one.own[one.rows].float()
                found.setdefault(one.weight, torch.zeros(one.own.shape))[one.rows] = change
        for module in sorted(adapted_beside(declared.saved)):
            one = _adapted(module, file, declared, base)
            if one is not None:
                found.setdefault(one.weight, torch.zeros(one.own.shape))[one.rows] += one.values
    return _with_tied(found, declared, base)


def own_weights(base: str, tensor: str) -> Tensor | None:
    """A tensor of the base's, as its files have it; of a head that is tied to the embedding this one."""
    own = stored_weights(base, tensor)
    return stored_embedding(base) if own is None and layer_of(tensor) in HEADS else own


def about_saved(declared: Declared, trained: Collection[str]) -> str | None:
    """What is to be said of an adapter's whole layers, if it has any.

    Args:
        trained: names of the weights that `trained_layers` gave.
    """
    changed = {own_name(name).rpartition(".")[0] for name in trained}
    tensors = [str(saved_whole(name)) for name in declared.saved]
    left = [tensor for tensor in tensors if own_name(tensor).rpartition(".")[0] not in changed]
    said = [f"{_few(left)} beside it is the base's own and is left out"] if left else []
    said += [f"{_few(trained)} beside it was trained, and is scored and merged whole"] if trained else []
    return "; ".join(said) or None


def refused_by(engine: str, trained: Collection[str]) -> str | None:
    """Why an engine cannot score an adapter that changes these weights of whole layers, if it cannot."""
    if not trained or engine == CARRIES_WHOLE:
        return None
    vocabulary = [name for name in trained if layer_of(name) in (*EMBEDDING_NAMES, *HEADS)]
    what = "changes the embeddings or the output head" if vocabulary else "modules_to_save: it replaces whole layers"
    return f"{what} ({_few(vocabulary or trained)}), which vLLM's LoRA cannot score; use search.engine: {CARRIES_WHOLE}"


def layer_of(tensor: str) -> str:
    """a.b.weight -> b."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


class _Trained(NamedTuple):
    """A weight of the base by its name, what it is there, and the rows that are others in an adapter."""

    weight: str
    own: Tensor
    rows: slice | list[int]
    values: Tensor


def _saved(name: str, file: safe_open, declared: Declared, base: str) -> _Trained | None:
    """What a tensor of an adapter's file changes in the base; None: nothing."""
    tensor, saved = str(saved_whole(name)), file.get_tensor(name)
    own, weight = own_weights(base, tensor), weight_name(base, tensor)
    rows = _rows(name, saved, declared)
    if own is None or weight is None or not _has_shape_of(own, saved, rows, layer_of(tensor)):
        if not is_of_text(tensor):
            raise _of_other_senses(name)
        raise AdapterError(f"modules_to_save: it saves {name} of shape {tuple(saved.shape)}, which the base model does not have")
    rows, values = _shared(rows, saved, len(own))
    if _is_own(values, own[rows]):
        return None
    if not is_of_text(tensor):
        raise _of_other_senses(f"{name} is not the base's")
    if own_name(weight).rpartition(".")[0] in map(own_name, declared.sizes):
        raise AdapterError(f"modules_to_save: it replaces a layer that it also adapts ({name} is not the base's)")
    if not torch.isfinite(values).all():
        raise AdapterError(f"NaN or Inf in the weights of {name}")
    return _Trained(weight, own, rows, values)


def _adapted(module: str, file: safe_open, declared: Declared, base: str) -> _Trained | None:
    """What factors on an embedding or an output head add to its weight; None: nothing."""
    (left_VR, right_RI), tensor = _factors(module, file, declared), f"{module}.weight"
    own, weight = own_weights(base, tensor), weight_name(base, tensor)
    if own is None or weight is None or own.dim() != 2 or right_RI.shape[1] != own.shape[1]:
        raise AdapterError(f"wrong shapes: factors on {module}, {len(left_VR)} x {right_RI.shape[1]}, do not fit the base")
    rows = slice(0, min(len(own), len(left_VR)))
    values = left_VR[rows] @ right_RI
    if not values.any():
        return None
    if not is_of_text(tensor):
        raise _of_other_senses(f"{module} is adapted")
    if not torch.isfinite(values).all():
        raise AdapterError(f"NaN or Inf in the weights of {module}")
    return _Trained(weight, own, rows, values)


def _factors(module: str, file: safe_open, declared: Declared) -> tuple[Tensor, Tensor]:
    """Two factors in float32 whose product, of tokens by features, is what they add to a weight. PEFT's factors on an embedding
    give features by tokens."""
    factors = [(found[1], name) for name in declared.saved if (found := factor_beside(name)) and found[0] == module]
    halves, names = sorted(half for half, _ in factors), dict(factors)
    if halves != ["A", "B"]:
        raise AdapterError(f"corrupt weights: of factors {module} has {', '.join(halves)}; one A and one B are needed")
    a_RI, b_OR = file.get_tensor(names["A"]).float(), file.get_tensor(names["B"]).float()
    rank, alpha = declared.own.get(module, (int(declared.config.r), float(declared.config.lora_alpha)))
    if a_RI.dim() != 2 or b_OR.dim() != 2 or not len(a_RI) == b_OR.shape[1] == rank:
        raise AdapterError(f"wrong shapes: {module} has lora_A {tuple(a_RI.shape)}, lora_B {tuple(b_OR.shape)} at rank {rank}")
    b_OR = b_OR * (alpha / (math.sqrt(rank) if declared.config.use_rslora else rank))
    return (a_RI.T, b_OR.T) if "lora_embedding_" in names["A"] else (b_OR, a_RI)


def _of_other_senses(what: str) -> AdapterError:
    return AdapterError(f"changes layers for pictures or sounds ({what}), which no text runs through")


def _rows(name: str, saved: Tensor, declared: Declared) -> slice | list[int]:
    """Which rows of the base's tensor are saved: the first ones, unless those of certain tokens are.

    Raises:
        AdapterError: the config does not say which.
    """
    if not TOKEN_ROWS.search(name):
        return slice(0, len(saved) if saved.dim() else 0)
    rows = _tokens(declared, str(saved_whole(name)).rpartition(".")[0])
    if len(rows) != len(saved) or len(set(rows)) != len(rows):
        raise AdapterError(f"wrong shapes: {name} has {len(saved)} rows, trainable_token_indices {len(set(rows))}")
    return rows


def _tokens(declared: Declared, module: str) -> list[int]:
    """Of which tokens a module has trained rows; a plain list is of the embedding."""
    asked = declared.config.trainable_token_indices or []
    if isinstance(asked, list):
        return asked
    return next((rows for layer, rows in asked.items() if module.endswith(layer)), [])


def _has_shape_of(own: Tensor, saved: Tensor, rows: slice | list[int], layer: str) -> bool:
    """Embeddings and heads may have other numbers of rows."""
    rows_count = layer not in (*EMBEDDING_NAMES, *HEADS) and isinstance(rows, slice)
    return own.dim() == saved.dim() > 0 and own.shape[1:] == saved.shape[1:] and (len(own) == len(saved) or not rows_count)


def _shared(rows: slice | list[int], saved: Tensor, count: int) -> tuple[slice | list[int], Tensor]:
    """Of the saved rows those that the base has, too: where, and what."""
    if isinstance(rows, slice):
        return slice(0, min(count, len(saved))), saved[:count]
    inside = [place for place, row in enumerate(rows) if row < count]
    return [rows[place] for place in inside], saved[inside]


def _is_own(saved: Tensor, own: Tensor) -> bool:
    """Whether saved rows are the base's, once those of the finer type are rounded to the other's."""
    return torch.equal(saved.to(own.dtype), own) or torch.equal(own.to(saved.dtype), saved)


def _with_tied(found: dict[str, Tensor], declared: Declared, base: str) -> dict[str, Tensor]:
    """With what a changed embedding changes in a head that is tied to it, and the other way round. PEFT unties the two where
    `modules_to_save` or `trainable_token_indices` names the layer: but for rows of an embedding, which it ties."""
    pair = tied_weights(base)
    given = {weight_name(base, str(saved_whole(name))) for name in declared.saved}
    for one, other in (pair, pair[::-1]) if pair else ():
        if one in found and other not in given and not _is_apart(one, declared):
            found[other] = found[one]
    return found


def _is_apart(weight: str, declared: Declared) -> bool:
    """Whether PEFT puts a layer of an adapter's own in the place of the base's, or factors beside it, which leaves what is tied
    to it as it is."""
    module = weight.rpartition(".")[0]
    if declared.config.ensure_weight_tying and layer_of(weight) not in HEADS:
        return False
    if own_name(module) in map(own_name, adapted_beside(declared.saved)):
        return True
    named: Iterable[str] = declared.config.modules_to_save or ()
    if layer_of(weight) in HEADS and isinstance(declared.config.trainable_token_indices, dict):
        named = [*named, *declared.config.trainable_token_indices]
    return any(module.endswith(one) for one in named)


def _few(tensors: Collection[str]) -> str:
    layers = sorted({layer_of(tensor) for tensor in tensors})
    more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
    return f"{', '.join(layers[:MOST_NAMED])}{more}"
