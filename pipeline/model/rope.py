"""Rotary embeddings that depend on how long a pass is: `longrope`, as Phi-3 and Phi-4 have it, and `dynamic`.

transformers turns all positions of a pass by its longest one. A row that shares a pass with a longer one, padding included, would
be turned otherwise than alone; `dynamic` even goes on as it did for the longest row that the model ever saw.

vLLM does neither: it takes longrope's long factors for all rows where its longest row is beyond the length of pretraining, its
short ones else, and of `dynamic` one base for all.

Shapes: B rows, T tokens, D features of a head.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def depends_on_length(config: Any) -> bool:
    """Whether a base's rotary embedding, or that of some of its layers, depends on how long a pass is."""
    return any(_is_by_length(one) for one in _parameters(config))


@contextmanager
def turned_alone(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Within it a pass of rows of these lengths, padded on the right, turns each row as if it were alone."""
    hooks = [turn.register_forward_hook(partial(_alone, lengths), with_kwargs=True) for turn in _turns(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_lengths(model: Any) -> None:
    """See to it that no pass of a model depends on earlier ones."""
    for turn in _turns(model):
        turn.register_forward_pre_hook(_forget)


def _parameters(config: Any) -> list[Mapping[str, Any]]:
    """Those of the rotary embedding, of each kind of layers where they have their own."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    own = [one for one in given.values() if isinstance(one, Mapping)]
    return own or [given]


def _is_by_length(parameters: Mapping[str, Any]) -> bool:
    kind = str(parameters.get("rope_type", parameters.get("type")))
    return kind == "longrope" or "dynamic" in kind


def _turns(model: Any) -> list[Any]:
    """The rotary embeddings of a model that depend on a pass' length."""
    if not depends_on_length(model.config):
        return []
    return [module for module in model.modules() if hasattr(module, "rope_type") and depends_on_length(module.config)]


def _forget(turn: nn.Module, inputs: Any = None) -> None:
    """What it keeps of the longest pass so far, under the names that transformers gives it."""
    for name in [name for name in vars(turn) if name.endswith("max_seq_len_cached")]:
        setattr(turn, name, 0)


def _alone(lengths: Sequence[int], turn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], together: Any) -> Any:
    """What a rotary embedding gives of each row alone, in place of what it gave of all together."""
    given = inspect.signature(turn.forward).bind(*args, **kwargs).arguments
    alike = [max(length, _fits(turn.config)) for length in lengths]  # rows that fit are all turned alike
    found = {longest: _of_length(turn, given, longest) for longest in set(alike)}
    if isinstance(together, Tensor):
        return _rows([found[longest] for longest in alike])
    return tuple(_rows(parts) for parts in zip(*(found[longest] for longest in alike), strict=True))


def _of_length(turn: Any, given: Mapping[str, Any], longest: int) -> Any:
    """Positions behind it are of padding, and none of a row's own tokens sees them."""
    _forget(turn)
    return turn.forward(**{**given, "position_ids": given["position_ids"].clamp(max=longest - 1)})


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Row b of part b, for each row; shape (..., B, T, D). A part has one row for all where their positions are the same."""
    rows = [part.narrow(-3, row % part.shape[-3], 1) for row, part in enumerate(parts)]
    return torch.cat(rows, dim=-3)


def _fits(config: Any) -> int:
    """Tokens up to which no row's length counts."""
    text = config.get_text_config()
    usual = [one.get("original_max_position_embeddings") for one in _parameters(config)]
    return min(tokens for tokens in [*usual, text.max_position_embeddings] if tokens)
