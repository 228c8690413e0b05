"""Layers that a base reads past an adapter, against what gradients say of adapters that PEFT puts on all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from sizes import SMALL
from test_architectures import NAMES, build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.peft_names import fresh_on, refuses
from pipeline.model.base_model import linear_shapes
from pipeline.model.uncalled_layers import uncalled_layers

READ_PAST = {"jamba": "mamba.dt_proj", "mamba": "mixer.dt_proj", "falcon_mamba": "mixer.dt_proj"}

LEAST_JUDGED = 80
"""Architectures of the sweep."""


def without_effect(model: Any, training: bool) -> set[str]:
    """Linear layers on which an adapter gets no gradient, while their own weights do."""
    kind, names = model.config.model_type, {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(name for name in names if not refuses(kind, name))
    adapted = fresh_on(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for weights in adapted.parameters():
        weights.requires_grad_(True)
    adapted.train(training)
    adapted(input_ids=torch.arange(3, 27).reshape(2, -1), use_cache=False).logits.float().pow(2).sum().backward()
    layers = {name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    untouched = {name for name, module in layers.items() if module.lora_B["default"].weight.grad is None}
    return {name for name in untouched if (own := layers[name].get_base_layer().weight.grad) is not None and own.any()}


def saved(folder: Path, name: str) -> str:
    build(name).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", [*READ_PAST, "llama", "qwen3_moe", "gpt2"])
def test_layers_that_are_read_past_an_adapter_are_those_that_it_does_not_train(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path, name)
    found = uncalled_layers(base)
    assert {module.partition("layers.")[2].partition(".")[2] for module in found} == (
        {READ_PAST[name]} if name in READ_PAST else set()
    )
    assert found <= linear_shapes(base)[0].keys()
    kept = {module for module in found if not refuses(name, module)}
    assert kept == without_effect(build(name), training=False) == without_effect(build(name), training=True)


def test_an_expert_that_no_token_came_to_is_not_taken_for_one_that_is_read(tmp_path: Path) -> None:
    """Experts of Jamba in some of its layers, beside mixers whose dt_proj is read."""
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    config = AutoConfig.for_model("jamba", **sizes, num_experts=4, num_experts_per_tok=1, expert_layer_period=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert {module.rpartition(".")[2] for module in uncalled_layers(str(tmp_path))} == {"dt_proj"}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_of_every_causal_architecture_such_layers_are_found(tmp_path: Path) -> None:
    judged, wrong = 0, dict[str, Any]()
    for name in NAMES:
        try:
            linear_shapes(base := saved(tmp_path / name, name))
            expected = without_effect(build(name), training=False) | without_effect(build(name), training=True)
        except Exception:  # not every one can be built so small, or takes an adapter on all of its layers
            continue
        found = {module for module in uncalled_layers(base) if not refuses(name, module)}
        judged += 1
        if found != expected:
            wrong[name] = (sorted(found), sorted(expected))
    print(f"{judged} judged")
    assert not wrong
    assert judged >= LEAST_JUDGED
