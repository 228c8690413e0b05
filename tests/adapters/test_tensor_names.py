"""What the names of tensors in an adapter's file say."""

import pytest

from pipeline.adapters.tensor_names import adapted_beside, factor_beside, saved_whole

FIRST = "base_model.model."


@pytest.mark.parametrize(
    ("name", "factor", "whole"),
    [
        ("lm_head.lora_A.weight", ("lm_head", "A"), "lm_head.weight"),
        ("lm_head.lora_B.default.weight", ("lm_head", "B"), "lm_head.weight"),
        ("model.embed_tokens.lora_embedding_B", ("model.embed_tokens", "B"), "model.embed_tokens.weight"),
        ("model.embed_tokens.lora_embedding_A.default", ("model.embed_tokens", "A"), "model.embed_tokens.weight"),
        ("lm_head.base_layer.weight", None, "lm_head.weight"),
        ("model.norm.modules_to_save.default.weight", None, "model.norm.weight"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", None, "model.embed_tokens.weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None, None),
        ("lm_head.lora_magnitude_vector", None, None),
    ],
)
def test_a_tensor_is_known_by_its_name(name: str, factor: tuple[str, str] | None, whole: str | None) -> None:
    assert factor_beside(FIRST + name) == factor
    assert saved_whole(FIRST + name) == whole
    assert adapted_beside([FIRST + name]) == ({factor[0]} if factor else set())
