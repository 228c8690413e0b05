"""Where the host reads what is computed, and so waits for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads:
    """Counts what makes the host wait for a device: values that are read, copies to the host, places that are looked for."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.deaf = False

    def __enter__(self) -> "HostReads":
        outer = self

        class Copies(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
                    outer.note(function.__name__)
                return function(*args, **(kwargs or {}))

        class Values(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = function.overloadpacket.__name__
                masks = name == "index" and any(place is not None and place.dtype == torch.bool for place in args[1])
                if masks or name in ("_local_scalar_dense", "nonzero", "masked_select"):
                    outer.note(name)
                return function(*args, **(kwargs or {}))

        self.modes = (Copies(), Values())
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        if not self.deaf:
            self.found.append(what)
