"""Whole layers that are saved beside an adapter's factors: the base's own say nothing, trained ones are refused.

PEFT saves embeddings and output heads where it thinks that the vocabulary has grown, and what `modules_to_save` names; other
trainers save whatever is in the model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.adapters.validation import open_weights, saved_whole
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.model.base_model import stored_embedding, stored_weights
from pipeline.model.layer_names import EMBEDDING_NAMES, HEADS, is_of_text

MOST_NAMED = 3
"""Layers that are named where several were saved."""


def require_untrained(folder: Path, names: Sequence[str], base: str) -> str | None:
    """See to it that what an adapter saves whole is what the base has, but for rows of new tokens, which no text of ours has.

    Args:
        names: of the tensors in the adapter's file.

    Returns:
        What is to be said of the adapter, if anything.

    Raises:
        AdapterError: a layer was trained.
    """
    if not names:
        return None
    with open_weights(folder / WEIGHTS_FILE) as file:
        for name in names:
            _require_own(name, file, base)
    layers = sorted({_layer(str(saved_whole(name))) for name in names})
    more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
    return f"{', '.join(layers[:MOST_NAMED])}{more} beside it is the base's own and is left out"


def _require_own(name: str, file: safe_open, base: str) -> None:
    tensor = str(saved_whole(name))
    layer = _layer(tensor)
    own = stored_weights(base, tensor)
    if own is None and layer in HEADS:  # tied to the embedding
        own = stored_embedding(base)
    if own is None or not _has_shape_of(own, tuple(file.get_slice(name).get_shape()), layer):
        raise _changed(tensor, name)
    if not _is_own(file.get_tensor(name), own):
        raise _changed(tensor, f"{name} is not the base's")


def _changed(tensor: str, what: str) -> AdapterError:
    if not is_of_text(tensor):
        return AdapterError(f"changes layers for pictures or sounds ({what}), which no text runs through")
    if _layer(tensor) in (*EMBEDDING_NAMES, *HEADS):
        return AdapterError(f"changes the embeddings or the output head ({what}), which vLLM's LoRA cannot score")
    return AdapterError(f"modules_to_save: it replaces whole layers ({what}), which vLLM's LoRA cannot score")


def _has_shape_of(own: Tensor, shape: tuple[int, ...], layer: str) -> bool:
    """Embeddings and heads may have other numbers of rows."""
    rows_count = layer not in (*EMBEDDING_NAMES, *HEADS)
    return own.dim() == len(shape) > 0 and own.shape[1:] == shape[1:] and (own.shape[0] == shape[0] or not rows_count)


def _is_own(saved: Tensor, own: Tensor) -> bool:
    """Whether the rows that both have are equal, once those of the finer type are rounded to the other's."""
    rows = min(len(own), len(saved))
    saved, own = saved[:rows], own[:rows]
    return torch.equal(saved.to(own.dtype), own) or torch.equal(own.to(saved.dtype), saved)


def _layer(tensor: str) -> str:
    """a.b.weight -> b."""
    return tensor.rpartition(".")[0].rpartition(".")[2]
