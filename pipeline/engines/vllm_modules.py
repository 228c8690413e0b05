"""The modules of an adapter by the names that vLLM has for them, and none left out without a word.

An adapter calls its modules as the base's class in transformers does. vLLM may have another class for it, with the language model
in another place, and passes over what it has no module for: all such adapters would score like the base. Here each module of an
adapter is found in the engine, or the adapter is refused.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.model.layer_names import own_name


class Places:
    """The modules of an engine that take an adapter."""

    def __init__(self, manager: Any) -> None:
        """`manager`: vLLM's LoRAModelManager, whose modules are several of an adapter's in one, such as q, k and v."""
        packed = manager.packed_modules
        self._names = {name for module in manager.modules for name in packed.get(module, [module])}
        self._called = defaultdict[str, list[str]](list)
        for name in self._names:
            self._called[own_name(name)].append(name)

    def put(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """An adapter's weights by the engine's names.

        Raises:
            ValueError: the engine has no module for some.
        """
        places = {place: module for module in weights if (place := self._of(module))}
        if left := sorted(weights.keys() - places.values()):
            raise ValueError(
                f"vLLM would leave out {len(left)} of the adapter's {len(weights)} modules: it has no {left[0]} that takes an "
                "adapter; set search.engine: transformers"
            )
        return {place: weights[module] for place, module in places.items()}

    def _of(self, module: str) -> str | None:
        """Where a module is: under its own name, else where the language model that it is in has it."""
        if module in self._names:
            return module
        found = self._called.get(own_name(module), [])
        return found[0] if len(found) == 1 else None


def put_in_place(worker: Any) -> None:
    """Runs in each of vLLM's workers, once: adapters that it reads then come by its own names, or not at all."""
    reader = getattr(worker.model_runner, "lora_manager", None)
    if reader is None:  # the engine is for the base alone
        return
    places, read = Places(reader._adapter_manager), reader._load_adapter

    def load(request: Any) -> Any:
        adapter = read(request)
        adapter.loras = places.put(adapter.loras)
        return adapter

    reader._load_adapter = load
