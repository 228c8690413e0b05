"""Multi-LoRA at speed on vLLM's CPU platform, as a vLLM plugin (entry point `vllm.general_plugins`).

vLLM's own CPU fallback gathers a copy of A and B for every token. A batch of the search holds long runs of tokens of one adapter,
so a few matrix products for each run compute the same. The plugin also brings `vllm_prompt_logprobs`, which runs the output head
only where a prompt's log-probabilities are wanted. On other platforms, and with a vLLM whose internals it does not know, it does
nothing.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from pipeline.engines import vllm_prompt_logprobs

KNOWN = ("0.32.",)
"""Versions of vLLM with the methods that are replaced here."""

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
    vllm_prompt_logprobs.register()


@dataclass(frozen=True)
class Slice:
    """One slice's B, and the columns that it reads and writes."""

    hidden: slice
    outputs: slice
    b_RO: Tensor


@dataclass(frozen=True)
class Weights:
    """One adapter in one layer at its own rank: A of all slices side by side, B of each."""

    a_IR: Tensor
    slices: list[Slice]


class SegmentedLora(PunicaWrapperCPU):
    """vLLM's CPU LoRA with one product a segment of tokens for A, and one for each B.

    Shapes: T tokens of the batch, I in features, O out features of a slice (q, k and v share one input), R rank, S slots.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.segments: list[Segment] = []
        self._layers: dict[int, Layer] = {}

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called once a batch, before its layers."""
        super().update_metadata(*args, **kwargs)
        self.segments = segments(self.token_lora_indices)

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
        if not self.segments:
            return
        y_TO, x_TI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        layer = self._layer(lora_a_stacked, lora_b_stacked, output_slices)
        for first, end, slot in self.segments:
            weights = layer.weights(slot, x.dtype)
            hidden_TR = x_TI[first:end] @ weights.a_IR
            for part in weights.slices:
                y_TO[first:end, part.outputs].addmm_(hidden_TR[:, part.hidden], part.b_RO, alpha=scale)

    def _layer(self, a_stacked: tuple[Tensor, ...], b_stacked: tuple[Tensor, ...], widths: tuple[int, ...]) -> "Layer":
        key = id(a_stacked[0])
        if key not in self._layers:
            self._layers[key] = Layer(a_stacked, b_stacked, widths)
        self._layers[key].refresh()
        return self._layers[key]


class Layer:
    """The adapters of one layer, without the zeros that fill vLLM's buffers up to max_lora_rank.

    Buffers: A (S, 1, R, I) and B (S, 1, O, R) for each slice.
    """

    def __init__(self, a_stacked: tuple[Tensor, ...], b_stacked: tuple[Tensor, ...], widths: tuple[int, ...]) -> None:
        self.a_stacked, self.b_stacked, self.widths = a_stacked, b_stacked, widths
        self._slots: dict[int, Weights] = {}
        self._versions: list[int] = []

    def refresh(self) -> None:
        """Forget what was taken from the buffers if anything has been written to them since: torch counts the writes."""
        versions = [buffer._version for buffer in (*self.a_stacked, *self.b_stacked)]
        if versions != self._versions:
            self._slots, self._versions = {}, versions

    def weights(self, slot: int, dtype: torch.dtype) -> Weights:
        """What a slot holds, in `dtype`; slices that its adapter leaves alone are left out."""
        if slot not in self._slots:
            self._slots[slot] = self._read(slot, dtype)
        return self._slots[slot]

    def _read(self, slot: int, dtype: torch.dtype) -> Weights:
        rows: list[Tensor] = []
        slices: list[Slice] = []
        left = start = 0
        for a_S1RI, b_S1OR, width in zip(self.a_stacked, self.b_stacked, self.widths, strict=True):
            a_RI = a_S1RI[slot, 0]
            rank = used_rank(a_RI)
            rows.append(a_RI[:rank])
            if rank:
                b_OR = b_S1OR[slot, 0, :, :rank]
                slices.append(Slice(slice(start, start + rank), slice(left, left + width), _transposed(b_OR, dtype)))
            left, start = left + width, start + rank
        return Weights(_transposed(torch.cat(rows), dtype), slices)


def _transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy laid out as the products read it."""
    return matrix.T.to(dtype).contiguous()


def used_rank(a_RI: Tensor) -> int:
    """Rows of A up to the last one that is not all zeros."""
    used = a_RI.any(dim=1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def segments(slot_T: Tensor) -> list[Segment]:
    """Runs of tokens of one adapter; tokens without an adapter are in none."""
    slots, lengths = torch.unique_consecutive(slot_T, return_counts=True)
    ends = lengths.cumsum(0)
    runs = zip((ends - lengths).tolist(), ends.tolist(), slots.tolist(), strict=True)
    return [(first, end, slot) for first, end, slot in runs if slot != NO_ADAPTER]
