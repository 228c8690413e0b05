"""An adapter's modules by an engine's names, with something that stands for vLLM's; test_vllm_bases.py has the real one."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engines.vllm_modules import Places, put_in_place

QKV = ["q_proj", "k_proj", "v_proj"]


def manager(*modules: str) -> Any:
    """Of an engine with such modules, of which `qkv_proj` is three of an adapter's in one."""
    packed = {name: [name.replace("qkv_proj", one) for one in QKV] for name in modules if name.endswith("qkv_proj")}
    return SimpleNamespace(modules=dict.fromkeys(modules), packed_modules=packed)


def put(engine: Any, *modules: str) -> list[str]:
    """The engine's names for an adapter's modules."""
    return [*Places(engine).put(dict.fromkeys(modules))]


def test_names_that_the_engine_has_stay_as_they_are() -> None:
    engine = manager("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj")
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"]
    assert put(engine, *modules) == modules


def test_a_class_that_has_the_language_model_elsewhere_gets_its_own_names() -> None:
    engine = manager("language_model.model.layers.0.self_attn.qkv_proj", "language_model.model.layers.1.mlp.down_proj")
    assert put(engine, "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj") == [
        "language_model.model.layers.0.self_attn.k_proj",
        "language_model.model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize(
    "left", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate", "vision_tower.layers.0.mlp.down_proj", "embed"]
)
def test_a_module_that_the_engine_does_not_have_is_said(left: str) -> None:
    """Of another layer, of another name, in an encoder whose layers are alike, and in none."""
    engine = manager("language_model.model.layers.0.self_attn.qkv_proj", "language_model.model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=rf"leave out 1 of the adapter's 2 modules: it has no {left} .* transformers"):
        put(engine, left, "model.layers.0.mlp.down_proj")


def test_where_the_engine_has_two_language_models_nothing_is_guessed() -> None:
    engine = manager("model.layers.0.mlp.down_proj", "text_model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match="leave out 1"):
        put(engine, "llm.layers.0.mlp.down_proj")


def test_a_worker_reads_adapters_by_its_own_names_or_not_at_all() -> None:
    def read(request: Any) -> Any:
        return SimpleNamespace(loras={request: "its weights"})

    reader = SimpleNamespace(_adapter_manager=manager("language_model.layers.0.mlp.down_proj"), _load_adapter=read)
    put_in_place(SimpleNamespace(model_runner=SimpleNamespace(lora_manager=reader)))
    assert reader._load_adapter("model.layers.0.mlp.down_proj").loras == {"language_model.layers.0.mlp.down_proj": "its weights"}
    with pytest.raises(ValueError, match="leave out 1"):
        reader._load_adapter("model.layers.7.mlp.down_proj")
    put_in_place(SimpleNamespace(model_runner=SimpleNamespace()))  # an engine for the base alone
