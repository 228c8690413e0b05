"""What tests of single adapters share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.base_model import Shapes, linear_shapes


@pytest.fixture(scope="module")
def base_layers(tiny_base: str) -> tuple[Shapes, str | None]:
    return linear_shapes(tiny_base)


@pytest.fixture(scope="session")
def seeing_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Gemma 3 with an encoder for pictures, whose files have names of transformers before 4.52."""
    folder = tmp_path_factory.mktemp("models") / "seeing-base"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16} | sizes
    vision = {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"} | sizes
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def good(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Path:
    """A valid adapter that a test may spoil."""
    return make_adapter(tmp_path / "good", tiny_base)
