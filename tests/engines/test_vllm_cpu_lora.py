"""The segmented CPU LoRA against vLLM's own, and when it steps aside."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install '.[cpu]'")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pipeline.engines import vllm as engine
from pipeline.engines import vllm_cpu_lora, vllm_prompt_logprobs
from pipeline.engines.scorer import EngineConfig
from pipeline.engines.vllm_cpu_lora import SegmentedLora, register, segments, used_rank

INPUTS, QKV, MAX_RANK = 48, (32, 16, 16), 64
ADAPTERS = {7: 4, 8: 64, 9: 16}
"""Adapter id -> its rank; each has the slot of its place here."""
INTERLEAVED = (7, 7, 7, 9, 9, 8, 8, 8, 8, 7, 9, 7)
EXACT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""What rounding may change: vLLM's own code keeps x A^T in float32."""


class Buffers:
    """A layer's LoRA buffers as vLLM lays them out, filled up with zeros to MAX_RANK."""

    def __init__(self, dtype: torch.dtype, widths: tuple[int, ...] = QKV):
        self.widths = widths
        self.a = tuple(torch.zeros(len(ADAPTERS), 1, MAX_RANK, INPUTS, dtype=dtype) for _ in widths)
        self.b = tuple(torch.zeros(len(ADAPTERS), 1, width, MAX_RANK, dtype=dtype) for width in widths)
        for slot, rank in enumerate(ADAPTERS.values()):
            self.fill(slot, rank)

    def fill(self, slot: int, rank: int, slices: tuple[int, ...] = (0, 1, 2)) -> None:
        """Put a random adapter into a slot, as vLLM does: all zeros first, then what the adapter has."""
        generator = torch.Generator().manual_seed(100 * slot + rank)
        for place, (a, b, width) in enumerate(zip(self.a, self.b, self.widths, strict=True)):
            a[slot], b[slot] = 0, 0
            if place in slices:
                a[slot, 0, :rank].copy_(torch.randn(rank, INPUTS, generator=generator) / INPUTS**0.5)
                b[slot, 0, :, :rank].copy_(torch.randn(width, rank, generator=generator) / rank**0.5)


def wrapper(kind: type[PunicaWrapperCPU], ids: tuple[int, ...]) -> PunicaWrapperCPU:
    """A wrapper that was told of a batch whose tokens use the adapters `ids` (0: none)."""
    made = kind(64, 16, "cpu")
    tell(made, ids)
    return made


def tell(made: PunicaWrapperCPU, ids: tuple[int, ...]) -> None:
    made.update_metadata(LoRAMapping(ids, (ids[0],), is_prefill=True), list(ADAPTERS), len(ADAPTERS), 400)


def outputs(made: PunicaWrapperCPU, buffers: Buffers, x: Tensor, start: Tensor) -> Tensor:
    y = start.clone()
    made.add_lora_linear(y, x, buffers.a, buffers.b, 1.0, buffers.widths)
    return y


def drawn(n_tokens: int, dtype: torch.dtype, widths: tuple[int, ...] = QKV) -> tuple[Tensor, Tensor]:
    """Inputs of a layer, and the outputs of its base."""
    generator = torch.Generator().manual_seed(n_tokens)
    draw = lambda width: torch.randn(n_tokens, width, generator=generator).to(dtype)  # noqa: E731
    return draw(INPUTS), draw(sum(widths))


def assert_as_vllm(made: PunicaWrapperCPU, ids: tuple[int, ...], buffers: Buffers, dtype: torch.dtype) -> None:
    x, start = drawn(len(ids), dtype, buffers.widths)
    expected = outputs(wrapper(PunicaWrapperCPU, ids), buffers, x, start)
    found = outputs(made, buffers, x, start)
    torch.testing.assert_close(found, expected, atol=EXACT[dtype], rtol=EXACT[dtype])
    assert ((found - start).abs().amax(dim=1) > 0.1).all()


def test_segments_are_runs_of_one_adapter() -> None:
    assert segments(torch.tensor([0, 0, 2, 2, 2, 0])) == [(0, 2, 0), (2, 5, 2), (5, 6, 0)]
    assert segments(torch.tensor([-1, 1, 1, -1, -1, 1])) == [(1, 3, 1), (5, 6, 1)]
    assert segments(torch.tensor([-1, -1])) == segments(torch.tensor([], dtype=torch.long)) == []


def test_rows_of_zeros_at_the_end_are_no_rank() -> None:
    a_RI = torch.zeros(8, 3)
    assert used_rank(a_RI) == 0
    a_RI[4, 1] = -1e-30
    assert used_rank(a_RI) == 5


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("widths", [QKV, (32, 32), (24,)], ids=["q k v", "gate up", "down"])
def test_the_same_outputs_as_vllm(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    """Adapters of rank 4, 16 and 64 side by side, in interleaved runs."""
    assert_as_vllm(wrapper(SegmentedLora, INTERLEAVED), INTERLEAVED, Buffers(dtype, widths), dtype)


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
def test_the_same_outputs_as_vllm_at_each_rank(rank: int) -> None:
    buffers = Buffers(torch.float32)
    buffers.fill(1, rank)
    assert_as_vllm(wrapper(SegmentedLora, (8,) * 5), (8,) * 5, buffers, torch.float32)


def test_a_slot_that_is_filled_again() -> None:
    """Also under inference mode, and with an adapter that has no k."""
    buffers, ids = Buffers(torch.float32), (7, 7, 8, 9)
    made = wrapper(SegmentedLora, ids)
    assert_as_vllm(made, ids, buffers, torch.float32)
    buffers.fill(0, 16)
    assert_as_vllm(made, ids, buffers, torch.float32)
    with torch.inference_mode():
        buffers.fill(0, 8, slices=(0, 2))
        assert_as_vllm(made, ids, buffers, torch.float32)
    tell(made, (9, 8))
    assert_as_vllm(made, (9, 8), buffers, torch.float32)


def test_an_adapter_without_this_layer_changes_nothing() -> None:
    buffers, (x, start) = Buffers(torch.float32), drawn(3, torch.float32)
    buffers.fill(0, 4, slices=())
    assert torch.equal(outputs(wrapper(SegmentedLora, (7, 7, 7)), buffers, x, start), start)


def test_tokens_without_an_adapter_are_left_as_they_are() -> None:
    """vLLM's own code takes the last slot for them, as index -1 does in torch."""
    buffers, (x, start) = Buffers(torch.float32), drawn(4, torch.float32)
    y = outputs(wrapper(SegmentedLora, (0, 7, 7, 0)), buffers, x, start)
    assert torch.equal(y[[0, 3]], start[[0, 3]])
    assert not torch.equal(y[[1, 2]], start[[1, 2]])
    assert torch.equal(outputs(wrapper(SegmentedLora, (0, 0, 0, 0)), buffers, x, start), start)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's CPU platform as it is without the plugin."""
    kind = type(vllm_cpu_lora.current_platform)
    monkeypatch.setattr(kind, "get_punica_wrapper", classmethod(lambda cls: "its own"))
    monkeypatch.setattr(CPUModelRunner, "_get_prompt_logprobs_dict", GPUModelRunner._get_prompt_logprobs_dict)
    return kind


def assert_untouched(platform: Any) -> None:
    assert platform.get_punica_wrapper() == "its own"
    assert CPUModelRunner._get_prompt_logprobs_dict is GPUModelRunner._get_prompt_logprobs_dict


def test_registering_twice_puts_ours_in_place(platform: Any) -> None:
    register()
    register()
    assert platform.get_punica_wrapper() == "pipeline.engines.vllm_cpu_lora.SegmentedLora"
    assert CPUModelRunner._get_prompt_logprobs_dict is vllm_prompt_logprobs.prompt_logprobs


@pytest.mark.parametrize(("plugins", "name"), [(None, "pipeline.engines.vllm_cpu_lora.SegmentedLora"), ("", "its own")])
def test_an_engine_uses_ours_where_our_package_is_not_installed(
    platform: Any, monkeypatch: pytest.MonkeyPatch, tiny_base: str, plugins: str | None, name: str
) -> None:
    """A Ray job brings our code along; who wants vLLM as it is says so by VLLM_PLUGINS."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr(engine, "LLM", lambda **_: None)
    engine.VllmScorer(EngineConfig(tiny_base, "float32", 8, ("q_proj",), 64, adapters_per_batch=2))
    assert platform.get_punica_wrapper() == name


def test_an_unknown_vllm_keeps_its_own_with_a_warning(
    platform: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_cpu_lora.vllm, "__version__", "9.9.0")
    with caplog.at_level(logging.WARNING):
        register()
    assert_untouched(platform)
    assert "vLLM 9.9.0 is not known" in caplog.text


def test_on_gpus_nothing_is_changed(platform: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "is_cpu", lambda self: False)
    register()
    assert_untouched(platform)
    assert not caplog.records
