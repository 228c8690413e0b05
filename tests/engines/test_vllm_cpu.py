"""The segmented CPU LoRA against vLLM's own, and when it steps aside."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'mashup-learning[cpu]'")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from pipeline.engines import vllm_cpu
from pipeline.engines.vllm_cpu import SegmentedLora, register, segments

SLOTS, INPUTS, SLICES = 3, 48, (32, 16, 16)


def test_segments_are_runs_of_one_adapter() -> None:
    assert segments([0, 0, 2, 2, 2, 0]) == [(0, 2, 0), (2, 5, 2), (5, 6, 0)]
    assert segments([-1, 1, 1, -1, -1, 1]) == [(1, 3, 1), (5, 6, 1)]
    assert segments([-1, -1]) == segments([]) == []


@pytest.mark.parametrize("rank", [4, 8, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_same_outputs_as_vllm(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    """A batch in which all tokens have an adapter, in runs of unequal length."""
    ids = (7, 7, 7, 9, 9, 8, 8, 8, 8, 7)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(ids), INPUTS, generator=generator).to(dtype)
    a = tuple(torch.randn(SLOTS, 1, rank, INPUTS, generator=generator).to(dtype) / INPUTS**0.5 for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, rank, generator=generator).to(dtype) / rank**0.5 for width in SLICES)
    start = torch.randn(len(ids), sum(SLICES), generator=generator).to(dtype)
    found = []
    for kind in (PunicaWrapperCPU, SegmentedLora):
        y = start.clone()
        _with_batch(kind, ids).add_lora_linear(y, x, a, b, 1.0, SLICES)
        found.append(y.float())
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)
    assert (found[1] - start.float()).abs().max() > 0.1


def test_tokens_without_an_adapter_are_left_as_they_are() -> None:
    """vLLM's own code takes the last slot for them, as index -1 does in torch."""
    ids = (0, 7, 7, 0)
    x, start = torch.randn(4, INPUTS), torch.randn(4, sum(SLICES))
    a = tuple(torch.randn(SLOTS, 1, 4, INPUTS) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, 4) for width in SLICES)
    y = start.clone()
    _with_batch(SegmentedLora, ids).add_lora_linear(y, x, a, b, 1.0, SLICES)
    assert torch.equal(y[[0, 3]], start[[0, 3]])
    assert not torch.equal(y[[1, 2]], start[[1, 2]])


def test_registering_twice_names_our_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(vllm_cpu.current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", platform.get_punica_wrapper)
    register()
    register()
    assert platform.get_punica_wrapper() == "pipeline.engines.vllm_cpu.SegmentedLora"


def test_an_unknown_vllm_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(vllm_cpu.current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: "its own"))
    monkeypatch.setattr(vllm_cpu.vllm, "__version__", "9.9.0")
    register()
    assert platform.get_punica_wrapper() == "its own"


def test_on_gpus_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(vllm_cpu.current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: "its own"))
    monkeypatch.setattr(platform, "is_cpu", lambda self: False)
    register()
    assert platform.get_punica_wrapper() == "its own"


def _with_batch(kind: type[PunicaWrapperCPU], ids: tuple[int, ...]) -> PunicaWrapperCPU:
    """A wrapper that was told of a batch whose tokens use the adapters `ids` (0: none)."""
    wrapper = kind(64, 16, "cpu")
    wrapper.update_metadata(LoRAMapping(ids, (ids[0],), is_prefill=True), [7, 8, 9], SLOTS, 400)
    return wrapper
