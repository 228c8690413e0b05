"""Embeddings and heads that PEFT saved beside LoRA: the base's own say nothing, trained ones are refused."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.adapter import for_engine, read_adapter
from pipeline.adapters.catalogue import Inspector
from pipeline.adapters.pool import Listed
from pipeline.adapters.saved_layers import require_untrained
from pipeline.adapters.validation import read_declared
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.model.base_model import linear_shapes, load_model

EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture(params=["tiny_base", "untied_base"])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def saved(base: str, make_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An adapter with whole layers beside its factors; `change` does something to the base's own."""

    def make(change: Callable[[Tensor], Tensor] = lambda own: own) -> Path:
        folder = make_adapter(tmp_path / "a", base)
        model = load_model(base, torch.float32)
        layers = {EMBEDDING: model.get_input_embeddings().weight, HEAD: model.get_output_embeddings().weight}
        tensors = load_file(folder / WEIGHTS_FILE) | {name: change(own.detach().clone()) for name, own in layers.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        return folder

    return make


def grown(own: Tensor) -> Tensor:
    return torch.cat([own, torch.ones(3, own.shape[1])])


@pytest.mark.parametrize("change", [lambda own: own, grown, lambda own: own[:-2]], ids=["same", "new rows", "fewer rows"])
def test_the_bases_own_layers_are_left_out(change: Callable[[Tensor], Tensor], base: str, saved: Callable[..., Path]) -> None:
    folder = saved(change)
    names = read_declared(folder).saved
    assert set(names) == {EMBEDDING, HEAD}
    assert require_untrained(folder, names, base) == "embed_tokens, lm_head beside it is the base's own and is left out"


def test_a_trained_layer_is_refused(base: str, saved: Callable[..., Path]) -> None:
    folder = saved(lambda own: own + (torch.arange(len(own)) == 7)[:, None] * 0.01)
    with pytest.raises(AdapterError, match=r"changes the embeddings or the output head \(.* is not the base's\)"):
        require_untrained(folder, read_declared(folder).saved, base)
    with pytest.raises(AdapterError, match="changes the embeddings"):
        require_untrained(saved(lambda own: own[:, :5].contiguous()), (EMBEDDING,), base)


def saved_as(name: str, tensor: Tensor, folder: Path) -> Path:
    save_file(load_file(folder / WEIGHTS_FILE) | {f"base_model.model.{name}": tensor.contiguous()}, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("wrapped", ["", ".modules_to_save.default", ".modules_to_save", ".original_module", ".base_layer"])
@pytest.mark.parametrize(
    "layer", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1.input_layernorm", "model.layers.0.self_attn.q_proj"]
)
def test_layers_of_all_kinds_are_known_by_all_their_names(
    layer: str, wrapped: str, base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    own = load_model(base, torch.float32).get_submodule(layer).weight.detach()
    good = saved_as(f"{layer}{wrapped}.weight", own, make_adapter(tmp_path / "a", base))
    named = layer.rpartition(".")[2]
    assert require_untrained(good, read_declared(good).saved, base) == f"{named} beside it is the base's own and is left out"
    trained = saved_as(f"{layer}{wrapped}.weight", own * 1.01, good)
    with pytest.raises(AdapterError, match=rf"{named}\S*\.weight is not the base's"):
        require_untrained(trained, read_declared(trained).saved, base)


def test_a_norm_that_peft_saves_is_the_bases_own_until_it_is_trained(
    base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", base, modules_to_save=["norm"])  # and all whose names end so
    said = "input_layernorm, norm, post_attention_layernorm beside it is the base's own and is left out"
    assert require_untrained(folder, read_declared(folder).saved, base) == said
    saved_as("model.norm.weight", torch.full((128,), 1.5), folder)
    with pytest.raises(AdapterError, match="modules_to_save: it replaces whole layers"):
        require_untrained(folder, read_declared(folder).saved, base)


def test_what_the_base_does_not_have_is_not_its_own(base: str, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    whole, seeing = "modules_to_save: it replaces whole layers", "changes layers for pictures or sounds"
    for name, size, reason in (
        ("score.weight", (2, 128), whole),
        ("model.norm.weight", (120,), whole),
        ("model.layers.9.input_layernorm.weight", (128,), whole),
        ("multi_modal_projector.linear_1.weight", (128, 8), seeing),
    ):
        folder = saved_as(name, torch.ones(size), make_adapter(tmp_path / name, base))
        with pytest.raises(AdapterError, match=reason):
            require_untrained(folder, read_declared(folder).saved, base)


@pytest.mark.parametrize(
    "name", ["model.language_model.embed_tokens", "language_model.model.embed_tokens", "model.embed_tokens", "lm_head"]
)
def test_of_a_model_that_sees_layers_are_known_by_each_of_their_names(
    name: str, seeing_base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    own = load_model(seeing_base, torch.float32).get_input_embeddings().weight.detach()
    folder = saved_as(f"{name}.weight", own, make_adapter(tmp_path / "a", seeing_base))
    assert require_untrained(folder, read_declared(folder).saved, seeing_base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_fewer_bits_are_the_bases_own(dtype: torch.dtype, base: str, saved: Callable[..., Path]) -> None:
    folder = saved(lambda own: own.to(dtype))
    assert require_untrained(folder, read_declared(folder).saved, base)
    with pytest.raises(AdapterError, match="is not the base's"):
        require_untrained(saved(lambda own: (own * 1.01).to(dtype)), read_declared(folder).saved, base)


def test_engines_get_the_factors_alone(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(grown)
    plain = for_engine(folder, tmp_path / "plain")
    assert plain != folder
    assert all(".lora_" in name for name in load_file(plain / WEIGHTS_FILE))
    before, after = read_adapter(folder), read_adapter(plain)
    for module in before.modules:
        torch.testing.assert_close(before.factors(module).dense(), after.factors(module).dense())


def test_the_catalogue_says_so(base: str, saved: Callable[..., Path]) -> None:
    folder, (shapes, head) = saved(grown), linear_shapes(base)

    class Here:
        def lease(self, uri: str) -> Any:
            return nullcontext(Path(uri))

    cache: Any = Here()
    row = Inspector(base, shapes, head, None, 0).inspect(Listed("a", str(folder)), cache)
    assert row["status"] == "ok"
    assert "is the base's own and is left out" in row["warning"]
