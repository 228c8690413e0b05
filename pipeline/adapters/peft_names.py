"""PEFT with layers called what the base calls them, and the layers that it refuses by name.

Since transformers 5 the experts of a mixture are bare parameters, and PEFT takes gate_proj, up_proj and down_proj of any adapter
of such a base for theirs. The linear layers that have these names, of dense MLPs and shared experts, lose their factors, and no
more than a warning says so. Adapters here are checked against the layers that the base has now: there is nothing to rename.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel
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


def refuses(model_type: str, module: str) -> bool:
    """Whether PEFT puts no adapter on a layer of this name in such a model, though older versions did: Mamba's kernels read the
    weights of some layers past an adapter."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        LoraModel._check_target_module_compatiblity(None, LoraConfig(), model, module.rpartition(".")[2])
    except ValueError:
        return True
    return False


def require_applied(adapted: PeftModel, modules: Iterable[str]) -> None:
    """See to it that an adapter lies on each of its modules: what is left out would be scored as the base.

    Raises:
        AdapterError: it does not.
    """
    layers = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    wanted = set(modules)
    if left := sorted(wanted - layers):
        raise AdapterError(f"PEFT would leave out {len(left)} of the adapter's {len(wanted)} modules, such as {left[0]}")
