"""Which linear layers of a base an adapter cannot act on, as the model reads their weights itself in place of calling them.

PEFT puts an adapter around a layer's call. Where a model hands the weights to a kernel or to a function, as Mamba's mixers do,
the adapter is there and changes nothing: it is scored as the base, and trained in vain; merged into the weights it is another
model. Whether a layer is called is seen in a forward pass without values, in evaluation and in training, as some models are
others there. Kernels that this machine lacks are not seen.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.core.errors import one_line
from pipeline.model.base_model import skeleton

TOKENS = 8
"""Of the row that is run."""


@lru_cache(maxsize=2)
def uncalled_layers(base: str) -> frozenset[str]:
    """Paths of the linear layers whose weights the base model reads without calling the layer, always or in training.

    Raises:
        InputError: the base model is not known.
    """
    model = skeleton(base).to(torch.bfloat16)  # in which all kernels are, also those for experts
    return frozenset().union(*(_read_past(model.train(training)) for training in (False, True)))


def _read_past(model: Any) -> set[str]:
    """Those of one forward pass. An expert that no token came to is neither called nor read; where the pass breaks off, what it
    came to is known."""
    called, read = set[str](), set[str]()
    ids_1T = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with _watched(model, called, read), torch.no_grad(), _NoValues():
        try:
            model(input_ids=ids_1T, use_cache=False)
        except Exception as error:  # models ask whatever they like of their values
            logging.getLogger(__name__).info("%s: cannot be run without values (%s)", type(model).__name__, one_line(error))
    return read - called


@contextmanager
def _watched(model: Any, called: set[str], read: set[str]) -> Iterator[None]:
    """Within, names of linear layers are kept as they are called, and as their weights are read from outside of their call."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name: type(module) for name, module in layers.items()}
    for name, module in layers.items():
        module.__class__ = _watching(name, kinds[name], called, read)
    try:
        yield
    finally:
        for name, module in layers.items():
            module.__class__ = kinds[name]


def _watching(name: str, kind: type[nn.Linear], called: set[str], read: set[str]) -> type[nn.Linear]:
    """A linear layer's own class, which tells of its calls and of reads of its weights."""
    inside = list[str]()

    class Watching(kind):  # type: ignore[valid-type, misc]
        def forward(self, *given: Any, **settings: Any) -> Any:
            called.add(name)
            inside.append(name)
            try:
                return super().forward(*given, **settings)
            finally:
                inside.pop()

        def __getattr__(self, key: str) -> Any:
            if key == "weight" and not inside:
                read.add(name)
            return super().__getattr__(key)

    return Watching


class _NoValues(TorchDispatchMode):
    """Tensors without values that are asked for one say zero, and are zero everywhere: experts then get no token."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.nonzero.default:
            found: Tensor = torch.empty(0, args[0].dim(), dtype=torch.long, device="meta")
            return found
        return func(*args, **(kwargs or {}))
