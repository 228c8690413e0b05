"""Layers that are saved whole beside LoRA: the base's own say nothing, of trained ones the change is read."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.adapter import for_engine, put_on, read_adapter
from pipeline.adapters.catalogue import Inspector, compare_adapters
from pipeline.adapters.pool import Listed
from pipeline.adapters.saved_layers import about_saved, refused_by, trained_layers
from pipeline.adapters.spectrum import families, sketch
from pipeline.adapters.validation import check_declared, read_declared
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.tables import INSPECTED
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


def changes(folder: Path, base: str) -> dict[str, Tensor]:
    return trained_layers(folder, read_declared(folder), base)


def said(folder: Path, base: str) -> str | None:
    return about_saved(read_declared(folder), changes(folder, base))


@pytest.mark.parametrize("change", [lambda own: own, grown, lambda own: own[:-2]], ids=["same", "new rows", "fewer rows"])
def test_the_bases_own_layers_are_left_out(change: Callable[[Tensor], Tensor], base: str, saved: Callable[..., Path]) -> None:
    folder = saved(change)
    assert set(read_declared(folder).saved) == {EMBEDDING, HEAD}
    assert not changes(folder, base)
    assert said(folder, base) == "embed_tokens, lm_head beside it is the base's own and is left out"


@pytest.mark.parametrize("rows", [lambda own: own, grown, lambda own: own[:-2]], ids=["same", "new rows", "fewer rows"])
def test_of_a_trained_layer_the_change_is_read(rows: Callable[[Tensor], Tensor], base: str, saved: Callable[..., Path]) -> None:
    folder = saved(lambda own: rows(own + (torch.arange(len(own)) == 7)[:, None] * 0.01))
    found = changes(folder, base)
    assert found.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    own = load_model(base, torch.float32).get_input_embeddings().weight
    expected = torch.zeros(own.shape)
    expected[7] = 0.01
    for change in found.values():
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)
    assert said(folder, base) == "embed_tokens, lm_head beside it was trained, and is scored and merged whole"


def test_a_layer_of_another_size_is_none_of_the_bases(base: str, saved: Callable[..., Path]) -> None:
    folder = saved(lambda own: own[:, :5].contiguous())
    with pytest.raises(AdapterError, match=r"it saves .* of shape \(\d+, 5\), which the base model does not have"):
        changes(folder, base)


WHOLE: list[tuple[dict[str, Any], set[str]]] = [
    ({"modules_to_save": ["embed_tokens"]}, {"model.embed_tokens.weight"}),
    ({"modules_to_save": ["lm_head"]}, {"lm_head.weight"}),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ({"modules_to_save": ["model.norm"]}, {"model.norm.weight"}),
    ({"trainable_token_indices": [3, 5]}, {"model.embed_tokens.weight"}),
    ({"trainable_token_indices": {"lm_head": [3, 5]}}, {"lm_head.weight"}),
]
"""Fields of a config, and the weights that PEFT then trains of an adapter's own."""


@pytest.mark.parametrize(("fields", "weights"), WHOLE)
def test_the_changes_are_those_that_peft_makes(
    fields: dict[str, Any], weights: set[str], base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", base, whole=0.1, **fields)
    found, model = changes(folder, base), load_model(base, torch.float32)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters(remove_duplicate=False)}
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    after = {name: weight.detach() - before[name] for name, weight in merged.named_parameters(remove_duplicate=False)}
    rows_of_tied = model.config.tie_word_embeddings and isinstance(fields.get("trainable_token_indices"), list)
    assert found.keys() == weights | ({"lm_head.weight"} if rows_of_tied else set())
    for name, change in found.items():
        assert change.any()
        torch.testing.assert_close(change, after[name], atol=1e-6, rtol=0)


ON_VOCABULARY: list[tuple[dict[str, Any], set[str]]] = [
    ({"targets": ["q_proj", "lm_head"]}, {"lm_head.weight"}),
    ({"targets": ["q_proj", "embed_tokens"], "use_rslora": True}, {"model.embed_tokens.weight"}),
    ({"targets": ["q_proj", "embed_tokens", "lm_head"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ({"targets": ".*(q_proj|lm_head)", "rank_pattern": {"lm_head": 2}, "alpha_pattern": {"lm_head": 16}}, {"lm_head.weight"}),
    ({"targets": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ({"targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, {"model.embed_tokens.weight"}),
]
"""Fields of a config with factors on embedding or head, and the weights that these change."""


@pytest.mark.parametrize(("fields", "weights"), ON_VOCABULARY)
def test_factors_on_embedding_and_head_act_as_they_do_under_peft(
    fields: dict[str, Any], weights: set[str], base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", base, std=0.2, whole=0.1, **fields)
    check_declared(read_declared(folder), *linear_shapes(base))
    found, tokens = changes(folder, base), torch.arange(3, 40)[None]
    tied = fields.get("ensure_weight_tying") and load_model(base, torch.float32).config.tie_word_embeddings
    assert found.keys() == weights | ({"lm_head.weight"} if tied else set())
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(load_model(base, torch.float32), str(folder)).eval()(tokens).logits
        ours = put_on(load_model(base, torch.float32), folder, base).eval()(tokens).logits
        factors = put_on(load_model(base, torch.float32), for_engine(folder, tmp_path / "e"), base).eval()(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(factors, theirs, atol=0.1)


def test_factors_on_the_head_that_change_nothing_are_left_out(
    base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", base, std=0.0, targets=["q_proj", "lm_head"])
    assert not changes(folder, base)
    assert said(folder, base) == "lm_head beside it is the base's own and is left out"


FACTOR_A, FACTOR_B = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"

WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one half": (lambda t: t.pop(FACTOR_B), "corrupt weights: of factors lm_head has A; one A and one B"),
    "a half twice": (
        lambda t: t.update({FACTOR_A.replace(".weight", ".default.weight"): torch.ones(4, 128)}),
        "of factors lm_head has A, A, B; one A and one B",
    ),
    "rank": (lambda t: t.update({FACTOR_A: torch.ones(3, 128)}), "wrong shapes: lm_head has lora_A .* at rank 4"),
    "width": (lambda t: t.update({FACTOR_A: torch.ones(4, 5)}), "wrong shapes: factors on lm_head, .* x 5, do not fit"),
    "no number": (lambda t: t.update({FACTOR_B: t[FACTOR_B] * float("nan")}), "NaN or Inf in the weights of lm_head"),
    "no factors of layers": (
        lambda t: [t.pop(name) for name in list(t) if "q_proj" in name],
        "no factors of a linear layer beside base_model.model.lm_head",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_factors_on_the_head_that_cannot_be_read_are_refused(
    case: str, base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    change, reason = WRONG[case]
    folder = make_adapter(tmp_path / "a", base, targets=["q_proj", "lm_head"])
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=reason):
        changes(folder, base)


def test_a_head_without_a_tensor_of_its_own_is_tied_where_the_config_says_so(
    base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    """Other trainers than PEFT save a tensor once that is in two places."""
    folder = make_adapter(tmp_path / "a", base, whole=0.1, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor for name, tensor in tensors.items() if "lm_head" not in name}, folder / WEIGHTS_FILE)
    tied = {"lm_head.weight"} if load_model(base, torch.float32).config.tie_word_embeddings else set()
    assert changes(folder, base).keys() == {"model.embed_tokens.weight"} | tied


def test_an_embedding_that_no_field_names_takes_along_the_head_that_is_tied_to_it(
    base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    """PEFT puts it into the model's own layer."""
    model = load_model(base, torch.float32)
    folder = saved_as(
        "model.embed_tokens.weight", model.get_input_embeddings().weight.detach() + 0.1, make_adapter(tmp_path, base)
    )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert changes(folder, base).keys() == {"model.embed_tokens.weight"} | tied


def test_rows_of_new_tokens_say_nothing(base: str, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter(tmp_path / "a", base, whole=0.1, trainable_token_indices=[3, 5])
    known = len(load_model(base, torch.float32).get_input_embeddings().weight)
    config = json.loads((folder / CONFIG_FILE).read_text())
    for tokens, trained in (([known, known + 1], 0), ([known, 5], 1)):
        (folder / CONFIG_FILE).write_text(json.dumps(config | {"trainable_token_indices": tokens}))
        found = changes(folder, base)
        assert [int(change.any(dim=1).sum()) for change in list(found.values())[:1]] == [trained] * bool(trained)
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"trainable_token_indices": [3]}))
    with pytest.raises(AdapterError, match="has 2 rows, trainable_token_indices 1"):
        changes(folder, base)


def test_numbers_that_are_none_are_found(base: str, saved: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match="NaN or Inf"):
        changes(saved(lambda own: own * float("nan")), base)


def test_the_engine_that_cannot_score_them_says_which_one_can() -> None:
    head, norm = {"lm_head.weight", "model.norm.weight"}, {"model.norm.weight"}
    way_out = "which vLLM's LoRA cannot score; use search.engine: transformers"
    assert refused_by("vllm", head) == f"changes the embeddings or the output head (lm_head), {way_out}"
    assert refused_by("vllm", norm) == f"modules_to_save: it replaces whole layers (norm), {way_out}"
    assert refused_by("vllm", ()) is refused_by("transformers", head) is None


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
    assert said(good, base) == f"{named} beside it is the base's own and is left out"
    trained = saved_as(f"{layer}{wrapped}.weight", own * 1.01, good)
    if named == "q_proj":  # which has factors, too
        with pytest.raises(AdapterError, match=rf"also adapts \(\S*{named}\S*\.weight is not the base's"):
            changes(trained, base)
    else:
        torch.testing.assert_close(changes(trained, base)[f"{layer}.weight"], own * 1.01 - own)


def test_a_norm_that_peft_saves_is_the_bases_own_until_it_is_trained(
    base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", base, modules_to_save=["norm"])  # and all whose names end so
    others = "input_layernorm, post_attention_layernorm"
    assert said(folder, base) == "input_layernorm, norm, post_attention_layernorm beside it is the base's own and is left out"
    saved_as("model.norm.weight", torch.full((128,), 1.5), folder)
    told = f"{others} beside it is the base's own and is left out; norm beside it was trained, and is scored and merged whole"
    assert said(folder, base) == told


def test_what_the_base_does_not_have_is_not_its_own(base: str, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    whole, seeing = "which the base model does not have", "changes layers for pictures or sounds"
    for name, size, reason in (
        ("score.weight", (2, 128), whole),
        ("model.norm.weight", (120,), whole),
        ("model.layers.9.input_layernorm.weight", (128,), whole),
        ("multi_modal_projector.linear_1.weight", (128, 8), seeing),
    ):
        folder = saved_as(name, torch.ones(size), make_adapter(tmp_path / name, base))
        with pytest.raises(AdapterError, match=reason):
            changes(folder, base)


@pytest.mark.parametrize(
    "name", ["model.language_model.embed_tokens", "language_model.model.embed_tokens", "model.embed_tokens", "lm_head"]
)
def test_of_a_model_that_sees_layers_are_known_by_each_of_their_names(
    name: str, seeing_base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    own = load_model(seeing_base, torch.float32).get_input_embeddings().weight.detach()
    folder = saved_as(f"{name}.weight", own, make_adapter(tmp_path / "a", seeing_base))
    assert not changes(folder, seeing_base)
    assert "own and is left out" in (said(folder, seeing_base) or "")
    saved_as(f"{name}.weight", own + 0.1, folder)  # of a tied head
    assert changes(folder, seeing_base).keys() == {"model.language_model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_fewer_bits_are_the_bases_own(dtype: torch.dtype, base: str, saved: Callable[..., Path]) -> None:
    folder = saved(lambda own: own.to(dtype))
    assert not changes(folder, base)
    assert changes(saved(lambda own: (own * 1.01).to(dtype)), base)


def test_engines_get_the_factors_alone(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(grown)
    plain = for_engine(folder, tmp_path / "plain")
    assert plain != folder
    assert all(".lora_" in name for name in load_file(plain / WEIGHTS_FILE))
    before, after = read_adapter(folder), read_adapter(plain)
    for module in before.modules:
        torch.testing.assert_close(before.factors(module).dense(), after.factors(module).dense())


def test_the_catalogue_says_so(base: str, saved: Callable[..., Path]) -> None:
    shapes, head = linear_shapes(base)

    class Here:
        def lease(self, uri: str) -> Any:
            return nullcontext(Path(uri))

    cache: Any = Here()
    row = Inspector(base, shapes, head, None, 0).inspect(Listed("a", str(saved(grown))), cache)
    assert (row["status"], row["whole"]) == ("ok", [])
    assert "is the base's own and is left out" in row["warning"]
    row = Inspector(base, shapes, head, None, 0).inspect(Listed("a", str(saved(lambda own: own + 0.1))), cache)
    assert (row["status"], row["whole"]) == ("ok", ["lm_head.weight", "model.embed_tokens.weight"])
    rows = pa.Table.from_pylist([row], schema=INSPECTED)
    assert compare_adapters(rows, "transformers")["status"].to_pylist() == ["ok"]
    refused = compare_adapters(rows, "vllm").to_pylist()[0]
    assert refused["status"] == "set_aside"
    assert refused["reason"].endswith("use search.engine: transformers")


def test_adapters_that_differ_in_whole_layers_alone_are_no_duplicates(base: str, saved: Callable[..., Path]) -> None:
    sketches = [
        sketch(read_adapter(saved(change), base=base), 0) for change in (grown, lambda own: own + 0.1, lambda own: own * 2)
    ]
    first, _ = families(np.array(sketches))
    assert first == [0, 1, 2]
