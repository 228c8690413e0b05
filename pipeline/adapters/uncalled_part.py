"""The part of an adapter on layers that its base reads past it (`model/uncalled_layers.py`).

PEFT trains no such part: where lora_B is zero nothing is lost without it. One that is not zero comes from a trainer or a version
in which it acted; PEFT would score and train the adapter without it, and a merge would have it in, which are two models.
"""

from collections.abc import Collection
from dataclasses import replace

from pipeline.adapters.adapter import Adapter
from pipeline.core.errors import AdapterError


def without_uncalled(adapter: Adapter, uncalled: Collection[str], model_type: str) -> Adapter:
    """An adapter without its part on these layers; itself where it has none.

    Args:
        uncalled: paths of layers, as the adapter calls them.
        model_type: of the base, for the message.

    Raises:
        AdapterError: that part changes the layers, or it is all that there is.
    """
    if not (past := [module for module in adapter.modules if module in uncalled]):
        return adapter
    about = f"{past[0].rpartition('.')[2]} layers ({past[0]}), whose weights a base of type {model_type} reads past an adapter"
    if any(all(half.any() for half in adapter.tensors[module]) for module in past):
        raise AdapterError(
            f"changes {about}: PEFT would leave this part out, and merged into the weights it would be another model"
        )
    if len(past) == len(adapter.modules):
        raise AdapterError(f"adapts {about}, and no others")
    return replace(adapter, tensors={module: pair for module, pair in adapter.tensors.items() if module not in uncalled})


def what_is_left_out(whole: Adapter, adapter: Adapter) -> str | None:
    """What is to be said of an adapter and the one without such a part, if anything."""
    if not (left := sorted(set(whole.target_leaves) - set(adapter.target_leaves))):
        return None
    return f"its {', '.join(left)} layers change nothing, as the base reads past an adapter on them, and are left out"
