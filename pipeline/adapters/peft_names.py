"""PEFT with layers called what the base calls them.

Since transformers 5 the experts of a mixture are bare parameters, and PEFT takes gate_proj, up_proj and down_proj of any adapter
of such a base for theirs. The linear layers that have these names, of dense MLPs and shared experts, lose their factors, and no
more than a warning says so. Adapters here are checked against the layers that the base has now: there is nothing to rename.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import save_and_load

from pipeline.core.errors import AdapterError

RENAMING, DECIDING = "is_transformers_ge_v5", (tuners_utils, save_and_load)
"""By this PEFT decides whether to rename: targets where it puts layers on a model, tensors where it reads weights."""

_one_at_a_time = Lock()


@contextmanager
def names_kept() -> Iterator[None]:
    """Within, PEFT renames neither targets nor tensors."""
    with _one_at_a_time:
        before = [getattr(module, RENAMING) for module in DECIDING]
        try:
            for module in DECIDING:
                setattr(module, RENAMING, False)
            yield
        finally:
            for module, value in zip(DECIDING, before, strict=True):
                setattr(module, RENAMING, value)


def fresh_on(model: Any, config: LoraConfig) -> PeftModel:
    """The base model with a fresh adapter on its layers."""
    with names_kept():
        return get_peft_model(model, config)


def require_applied(adapted: PeftModel, modules: Iterable[str]) -> None:
    """See to it that an adapter lies on each of its modules: what is left out would be scored as the base.

    Raises:
        AdapterError: it does not.
    """
    layers = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    wanted = set(modules)
    if left := sorted(wanted - layers):
        raise AdapterError(f"PEFT would leave out {len(left)} of the adapter's {len(wanted)} modules, such as {left[0]}")
