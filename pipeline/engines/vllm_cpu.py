"""Multi-LoRA at speed on vLLM's CPU platform, as a vLLM plugin (entry point `vllm.general_plugins`).

vLLM's own CPU fallback gathers a copy of A and B for every token. A batch of the search holds long runs of tokens of one adapter,
so one matrix product for each run computes the same. On other platforms, and with a vLLM whose internals it does not know, the
plugin does nothing.
"""

import logging
from typing import Any

import vllm
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

KNOWN = ("0.32.",)
"""Versions of vLLM whose wrapper has the methods that are replaced here."""

NO_ADAPTER = -1
Segment = tuple[int, int, int]
"""First token, last token + 1, and the slot of the adapter that they use."""


def register() -> None:
    """Name our wrapper to vLLM's CPU platform. vLLM calls this in each of its processes; calling it again changes nothing."""
    if not current_platform.is_cpu():
        return
    if not vllm.__version__.startswith(KNOWN):
        logging.getLogger(__name__).warning("vLLM %s is not known: its own CPU LoRA is used", vllm.__version__)
        return
    platform: Any = type(current_platform)
    platform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.{SegmentedLora.__name__}")


class SegmentedLora(PunicaWrapperCPU):
    """vLLM's CPU LoRA with one product a segment of tokens.

    Shapes: T tokens of the batch, I in features, O out features of a slice (q, k and v share one input), R rank, S slots.
    """

    segments: list[Segment]

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called once a batch, before its layers."""
        super().update_metadata(*args, **kwargs)
        self.segments = segments(self.token_lora_indices.tolist())

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y_TO += scale (x_TI A^T) B^T, with the A and B of each token's adapter, for each slice of the outputs.

        vLLM has put alpha / r into B already and passes scale = 1.
        """
        y_TO, x_TI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for first, end, slot in self.segments:
            left = 0
            for a_SRI, b_SOR, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                hidden_TR = x_TI[first:end] @ a_SRI[slot, 0].T.to(x.dtype)
                y_TO[first:end, left : left + width] += scale * (hidden_TR @ b_SOR[slot, 0].T.to(x.dtype))
                left += width


def segments(slots: list[int]) -> list[Segment]:
    """Runs of tokens of one adapter; tokens without an adapter are in none."""
    runs: list[Segment] = []
    for place, slot in enumerate(slots):
        if slot == NO_ADAPTER:
            continue
        if runs and runs[-1][1] == place and runs[-1][2] == slot:
            runs[-1] = (runs[-1][0], place + 1, slot)
        else:
            runs.append((place, place + 1, slot))
    return runs
