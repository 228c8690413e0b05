"""Embeddings and output heads that are saved beside an adapter's factors: the base's own say nothing, trained ones are refused.

PEFT saves them where it thinks that the vocabulary has grown, or where `modules_to_save` names them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.validation import HEADS, open_weights
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.model.base_model import stored_weights


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
            _compare(name, file.get_tensor(name), base)
    return f"{', '.join(sorted(_layer(name) for name in names))} beside it is the base's own and is left out"


def _compare(name: str, saved: Tensor, base: str) -> None:
    layer = _layer(name)
    own = stored_weights(base, layer)
    if own is None and layer in HEADS:  # tied to the embedding
        own = stored_weights(base, None)
    if own is None or own.dim() != saved.dim() or own.shape[1:] != saved.shape[1:]:
        raise AdapterError(f"changes the embeddings or the output head ({name}), which vLLM's LoRA cannot score")
    rows = min(len(own), len(saved))
    if not torch.equal(saved[:rows].to(own.dtype), own[:rows]):
        raise AdapterError(
            f"changes the embeddings or the output head ({name} is not the base's), which vLLM's LoRA cannot score"
        )


def _layer(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
