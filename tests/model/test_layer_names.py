"""What layers are called, against transformers' own models."""

import pytest
import torch
from sizes import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.layer_names import is_of_text, own_name, unwrapped


@pytest.mark.parametrize("architecture", ["gemma3", "got_ocr2", "fuyu", "llama", "qwen3_moe", "opt", "gpt_neox"])
def test_text_runs_through_the_layers_of_the_decoder_alone(architecture: str) -> None:
    config = AutoConfig.for_model(architecture)
    config.get_text_config().update({name: size for name, size in SMALL.items() if hasattr(config.get_text_config(), name)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reading = {*model.get_decoder().modules(), model.get_output_embeddings()}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 2
    assert [name for name, module in linear if is_of_text(name) != (module in reading)] == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj",
        "language_model.model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",
        "_orig_mod.model.layers.0._orig_mod.mlp.up_proj",
        "module.transformer.layers.0.mlp.up_proj",
    ],
)
def test_a_layer_has_one_own_name(name: str) -> None:
    assert own_name(name) == "layers.0.mlp.up_proj"


def test_only_what_leads_to_the_language_model_is_taken_off() -> None:
    assert own_name("language_model.lm_head.weight") == "lm_head.weight"
    assert own_name("model.vision_tower.encoder.layers.0.mlp.fc1") == "vision_tower.encoder.layers.0.mlp.fc1"
    assert own_name("layers.0.transformer.up_proj") == "layers.0.transformer.up_proj"
    assert unwrapped("model.submodule.x") == "model.submodule.x"
