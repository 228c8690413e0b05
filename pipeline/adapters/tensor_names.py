"""What the names of tensors in an adapter's file say."""

import re
from collections.abc import Iterable

from pipeline.model.layer_names import EMBEDDING_NAMES, HEADS, unwrapped

PREFIX = "base_model.model."

WRAPPED = re.compile(r"\.((token_adapter\.)?base_layer|original_module|modules_to_save(\.\w+)?)(?=\.(weight|bias)$)")
"""What PEFT puts between a layer's name and that of its weights, while the layer is in a model that is trained."""

TOKEN_ROWS = re.compile(r"\.token_adapter\.trainable_tokens_delta(\.\w+)?$")
"""Ends the name of those rows of an embedding that `trainable_token_indices` names."""

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")
"""A factor's name, with or without that of the adapter in a model, such as `default`."""

EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(\.\w+)?")
"""Likewise of a factor on an embedding."""


def factor_beside(name: str) -> tuple[str, str] | None:
    """The module of a factor on an embedding or an output head, and which one it is, A or B. None: the tensor is another one."""
    plain = unwrapped(name).removeprefix(PREFIX)
    if found := EMBEDDING_FACTOR.fullmatch(plain):
        return found["module"], found["half"]
    found = FACTOR.fullmatch(plain)
    is_beside = found and found["module"].rpartition(".")[2] in (*EMBEDDING_NAMES, *HEADS)
    return (found["module"], found["half"]) if found and is_beside else None


def adapted_beside(saved: Iterable[str]) -> set[str]:
    """The embeddings and output heads on which there are factors among tensors of an adapter's file."""
    return {found[0] for name in saved if (found := factor_beside(name))}


def saved_whole(name: str) -> str | None:
    """Which of the base's tensors one in an adapter's file stands for, as PEFT saves embeddings and output heads where it thinks
    that the vocabulary has grown, whatever `modules_to_save` names, rows of tokens that were trained, and factors on embeddings
    and heads. Whether it changes the base's own is seen where weights are read. None: it is something else."""
    if factor := factor_beside(name):
        return f"{factor[0]}.weight"
    plain = TOKEN_ROWS.sub(".weight", unwrapped(name))
    if not plain.startswith(PREFIX) or ".lora_" in plain or not plain.endswith((".weight", ".bias")):
        return None
    return WRAPPED.sub("", plain.removeprefix(PREFIX))
