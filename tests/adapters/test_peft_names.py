"""Adapters on a mixture of experts lie on every layer that they have, and it is said where they would not."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import save_and_load
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import Adapter, from_factors, put_on, write_adapter
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.peft_names import RENAMING, fresh_on, names_kept, refuses, require_applied
from pipeline.core.errors import AdapterError
from pipeline.model.base_model import linear_shapes

MLP = ("gate_proj", "up_proj", "down_proj")
SHARED = "model.layers.1.mlp.shared_experts"
IDS = torch.arange(3, 11)[None]


def load(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def adapter_on(base: str, leaves: tuple[str, ...]) -> Adapter:
    shapes, _ = linear_shapes(base)
    torch.manual_seed(1)
    chosen = {name: shape for name, shape in shapes.items() if name.endswith(leaves)}
    deltas = {name: Factors(0.3 * torch.randn(2, inner), 0.3 * torch.randn(out, 2)) for name, (out, inner) in chosen.items()}
    return from_factors(base, deltas, 2, 2, shapes, seed=0)


def by_hand(base: str, adapter: Adapter) -> torch.Tensor:
    """Logits of the base with the delta weights added to its own."""
    model = load(base)
    with torch.no_grad():
        for module in adapter.modules:
            model.get_submodule(module).weight += adapter.factors(module).dense()
        return model(IDS).logits


@pytest.mark.parametrize("leaves", [MLP, (*MLP, "o_proj"), ("gate_proj",)])
def test_layers_of_a_mixture_that_are_called_as_experts_were_take_their_factors(
    leaves: tuple[str, ...], mixture_base: str, tmp_path: Path
) -> None:
    adapter = adapter_on(mixture_base, leaves)
    assert any(SHARED in module for module in adapter.modules)
    write_adapter(tmp_path, adapter)
    with torch.no_grad():
        found = put_on(load(mixture_base), tmp_path, mixture_base)(IDS).logits
        assert (found - load(mixture_base)(IDS).logits).abs().max() > 0.01
    torch.testing.assert_close(found, by_hand(mixture_base, adapter), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_lies_on_such_layers_too(mixture_base: str) -> None:
    fresh = fresh_on(load(mixture_base), LoraConfig(r=2, target_modules=["o_proj", *MLP], task_type="CAUSAL_LM"))
    assert isinstance(fresh.get_base_model().get_submodule(f"{SHARED}.up_proj"), LoraLayer)


def test_an_adapter_of_which_a_part_is_left_out_is_refused(
    mixture_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.adapters.adapter.names_kept", nullcontext)
    write_adapter(tmp_path, adapter_on(mixture_base, (*MLP, "o_proj")))
    with pytest.raises(AdapterError, match=r"PEFT would leave out 6 of the adapter's 8 modules, such as model.layers.0.mlp.down"):
        put_on(load(mixture_base), tmp_path, mixture_base)


def test_an_adapter_that_is_whole_is_not_refused(tiny_base: str) -> None:
    fresh = fresh_on(load(tiny_base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    require_applied(fresh, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])


def test_layers_that_peft_refuses_by_name() -> None:
    mixer = "backbone.layers.0.mixer"
    asked = [("mamba2", f"{mixer}.out_proj"), ("mamba2", f"{mixer}.in_proj"), ("llama", f"{mixer}.out_proj")]
    assert [refuses(*one) for one in asked] == [True, False, False]


def test_peft_is_as_it_was_afterwards() -> None:
    """It may be used by others in the same process."""
    before = [getattr(module, RENAMING) for module in (tuners_utils, save_and_load)]
    with names_kept():
        assert not any(getattr(module, RENAMING) for module in (tuners_utils, save_and_load))
    assert [getattr(module, RENAMING) for module in (tuners_utils, save_and_load)] == before == [True, True]
