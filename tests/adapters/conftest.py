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


@pytest.fixture
def good(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Path:
    """A valid adapter that a test may spoil."""
    return make_adapter(tmp_path / "good", tiny_base)


@pytest.fixture(scope="session")
def mixture_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GLM 4 MoE: a dense MLP in its first layer, experts beside a shared one in its second."""
    folder = tmp_path_factory.mktemp("models") / "mixture-base"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}
    groups = {"num_key_value_heads": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model("glm4_moe", **sizes, **experts, **groups)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)
