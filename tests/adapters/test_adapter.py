"""Reading, checking and writing adapters, with PEFT itself as the ground truth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import edit_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.adapter import (
    alpha_at,
    for_engine,
    from_factors,
    plain,
    put_on,
    read_adapter,
    text_targets,
    with_whole,
    write_adapter,
)
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.saved_layers import about_saved
from pipeline.adapters.validation import read_declared
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.model.base_model import Shapes, linear_shapes

Q0 = "model.layers.0.self_attn.q_proj"
Q0_A = f"base_model.model.{Q0}.lora_A.weight"
Q0_B = f"base_model.model.{Q0}.lora_B.weight"

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank": 9},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3}},
    "both_patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.v_proj": 1}},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "all_linear": {"targets": "all-linear", "rank": 2},
    "regex": {"targets": r".*layers\.1\.mlp\.(up|down)_proj"},
    "one_layer": {"layers_to_transform": [1]},
    "excluded": {"targets": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def deltas_by_peft(folder: Path, base: str) -> dict[str, Tensor]:
    """What PEFT's own merge adds to each weight of the base."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).merge_and_unload().state_dict()
    changed = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    return {name.removesuffix(".weight"): delta for name, delta in changed.items()}


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_and_check(folder: Path, base_layers: tuple[Shapes, str | None]) -> None:
    read_adapter(folder, *base_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_those_that_peft_merges(
    kind: str, tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], base_layers: tuple[Shapes, str | None]
) -> None:
    adapter = read_adapter(make_adapter(tmp_path, tiny_base, **KINDS[kind]), *base_layers)
    expected = deltas_by_peft(tmp_path, tiny_base)
    assert adapter.modules == sorted(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(adapter.factors(module).dense(), delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_has_one_rank_and_the_same_deltas(
    kind: str, tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], base_layers: tuple[Shapes, str | None]
) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a", tiny_base, **KINDS[kind]))
    write_adapter(tmp_path / "b", plain(adapter))
    read_and_check(tmp_path / "b", base_layers)
    assert read_declared(tmp_path / "b").uniform
    expected, found = deltas_by_peft(tmp_path / "a", tiny_base), deltas_by_peft(tmp_path / "b", tiny_base)
    assert sorted(found) == sorted(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_config_and_tensors(
    kind: str, tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a", tiny_base, **KINDS[kind]))
    write_adapter(tmp_path / "b", adapter)
    again = read_adapter(tmp_path / "b")
    assert again.config.to_dict() == adapter.config.to_dict()
    assert again.modules == adapter.modules
    for module in adapter.modules:
        assert all(torch.equal(x, y) for x, y in zip(again.tensors[module], adapter.tensors[module], strict=True))


def test_bfloat16_weights_are_read_and_merged_in_float32(good: Path, tiny_base: str) -> None:
    edit_weights(good, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    adapter = read_adapter(good)
    a_RI, b_OR = adapter.tensors[Q0]
    assert a_RI.dtype == torch.bfloat16
    torch.testing.assert_close(adapter.factors(Q0).dense(), 2.0 * b_OR.float() @ a_RI.float())


def test_summary_of_an_adapter(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> None:
    adapter = read_adapter(make_adapter(tmp_path, tiny_base, rank_pattern={"q_proj": 16}))
    assert adapter.max_rank == 16
    assert adapter.target_leaves == ["q_proj", "v_proj"]
    assert not read_declared(tmp_path).uniform


def test_a_config_that_also_names_what_is_no_linear_layer_is_not_handed_to_engines(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path, tiny_base)
    assert read_declared(folder).uniform
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "input_layernorm"]}))
    assert not read_declared(folder).uniform


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("alpha", [16.0, 5.5])
def test_from_factors_gives_the_deltas_at_the_wished_rank(
    rank: int, alpha: float, tmp_path: Path, tiny_base: str, base_layers: tuple[Shapes, str | None]
) -> None:
    shapes, _ = base_layers
    torch.manual_seed(0)
    modules = [name for name in shapes if name.endswith(("k_proj", "down_proj"))]
    deltas = {m: Factors(torch.randn(3, shapes[m][1]) * 0.1, torch.randn(shapes[m][0], 3) * 0.1) for m in modules}
    write_adapter(tmp_path, from_factors(tiny_base, deltas, rank, alpha, shapes, seed=1))
    read_and_check(tmp_path, base_layers)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (rank, alpha, ["down_proj", "k_proj"])
    found = deltas_by_peft(tmp_path, tiny_base)
    assert sorted(found) == sorted(modules)
    for module in modules:
        torch.testing.assert_close(found[module], deltas[module].dense(), rtol=1e-4, atol=1e-6)


def test_from_factors_is_a_function_of_its_seed(tiny_base: str, base_layers: tuple[Shapes, str | None]) -> None:
    delta = {Q0: Factors(torch.ones(1, 128), torch.ones(128, 1))}
    build = lambda seed: from_factors(tiny_base, delta, 4, 8, base_layers[0], seed).tensors[Q0][0]  # noqa: E731
    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_from_factors_names_modules_in_full_where_leaf_names_would_name_more(
    tmp_path: Path, tiny_base: str, base_layers: tuple[Shapes, str | None]
) -> None:
    delta = {Q0: Factors(torch.ones(1, 128), torch.ones(128, 1))}
    write_adapter(tmp_path, from_factors(tiny_base, delta, 1, 1, base_layers[0], seed=0))
    read_and_check(tmp_path, base_layers)
    assert list(deltas_by_peft(tmp_path, tiny_base)) == [Q0]


def test_from_factors_names_modules_in_full_where_a_leaf_name_is_on_the_way_to_another(tmp_path: Path) -> None:
    """As in Gemma 4's encoder for pictures, whose q_proj is a module with a linear layer inside, for which PEFT has no code."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    }
    seeing = sizes | {"num_hidden_layers": 1, "patch_size": 14}
    config = AutoConfig.for_model("gemma4", text_config=sizes | text, vision_config=seeing, audio_config=None)
    config.save_pretrained(tmp_path)
    shapes, _ = linear_shapes(str(tmp_path))
    assert any(name.endswith("q_proj.linear") for name in shapes)
    named = [name for name in shapes if name.endswith("q_proj")]
    delta = {name: Factors(torch.ones(1, shapes[name][1]), torch.ones(shapes[name][0], 1)) for name in named}
    assert len(named) == 2
    assert from_factors(str(tmp_path), delta, 1, 1, shapes, seed=0).config.target_modules == set(named)


@pytest.fixture
def numbered_base(tmp_path: Path) -> str:
    """The config of a tiny Gemma 3n, which has linear layers in lists, as in altup_projections.0."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    inputs = {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
    layers = {"layer_types": ["full_attention"] * 2, "intermediate_size": [48] * 2, "activation_sparsity_pattern": [0.0] * 2}
    config = AutoConfig.for_model("gemma3n_text", **sizes, **inputs, **layers, altup_num_inputs=2, laurel_rank=4)
    config.save_pretrained(tmp_path / "numbered")
    return str(tmp_path / "numbered")


def test_from_factors_names_in_full_what_is_called_as_a_layer_of_another_kind(numbered_base: str, tmp_path: Path) -> None:
    """The 0 of altup_projections.0 also names each first layer of a list, on which PEFT cannot put an adapter."""
    shapes, _ = linear_shapes(numbered_base)
    modules = [name for name in shapes if name.endswith(("q_proj", ".0"))]
    assert "model.altup_projections.0" in modules
    deltas = {name: Factors(torch.ones(2, shapes[name][1]), torch.ones(shapes[name][0], 2)) for name in modules}
    adapter = from_factors(numbered_base, deltas, 2, 2, shapes, seed=0)
    assert adapter.config.target_modules == set(modules)
    write_adapter(tmp_path, adapter)
    put_on(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(numbered_base)), tmp_path, numbered_base)


def test_names_of_a_fresh_adapters_layers_mean_layers_of_text_alone(tiny_base: str, seeing_base: str) -> None:
    assert text_targets(("q_proj", "v_proj"), tiny_base) == ["q_proj", "v_proj"]
    named = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert text_targets(("q_proj",), seeing_base) == text_targets(named, seeing_base) == named


CONFIGS = {
    "other method": ({"peft_type": "IA3"}, "not LoRA: peft_type is 'IA3'"),
    "MLX": ({"fine_tune_type": "lora", "peft_type": None}, "MLX: an adapter of mlx_lm"),
    "no method": ({"peft_type": None}, "not LoRA"),
    "dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "bare parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters: it adapts expert layers"),
    "token indices": ({"trainable_token_indices": [-1]}, "corrupt config: trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "pissa by fast svd": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "r is zero": ({"r": 0}, "r is 0"),
    "r is negative": ({"r": -4}, "r is -4"),
    "r is text": ({"r": "4"}, "r is '4'"),
    "r is true": ({"r": True}, "r is True"),
    "r is absent": ({"r": None}, "r is None"),
    "r is not the file's": ({"r": 8}, "wrong shapes: .*lora_A .4, 128.* rank 8"),
    "alpha is text": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "lora_alpha is .?nan"),
    "alpha is too large for a float": ({"lora_alpha": 10**400}, "lora_alpha"),
    "more targets than weights": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing weights: .*k_proj"),
    "targets are no regex": ({"target_modules": "(q_proj"}, "corrupt config|target_modules"),
    "targets are a number": ({"target_modules": 5}, "corrupt config|target_modules"),
    "rank_pattern is a list": ({"rank_pattern": ["q_proj"]}, "corrupt config|rank_pattern"),
    "rank_pattern holds text": ({"rank_pattern": {"q_proj": "many"}}, "corrupt config|rank_pattern"),
    "rank_pattern holds zero": ({"rank_pattern": {"q_proj": 0}}, "rank"),
    "rank_pattern is not the file's": ({"rank_pattern": {"q_proj": 2}}, "wrong shapes: .*q_proj.* rank 2"),
    "alpha_pattern holds text": ({"alpha_pattern": {"q_proj": "high"}}, "corrupt config|alpha_pattern"),
    "alpha_pattern holds NaN": ({"alpha_pattern": {"q_proj": float("nan")}}, "corrupt config|alpha_pattern"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_be_a_donor_is_set_aside(case: str, good: Path, base_layers: tuple[Shapes, str | None]) -> None:
    changes, reason = CONFIGS[case]
    edit_config(good, **changes)
    with pytest.raises(AdapterError, match=reason):
        read_and_check(good, base_layers)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"peft_type": "LORA", "r": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00garbage", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "not LoRA"),
    ],
)
def test_config_that_is_no_json_object_is_set_aside(content: bytes, reason: str, good: Path) -> None:
    (good / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(good)


def test_config_is_missing(good: Path) -> None:
    (good / CONFIG_FILE).unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        read_adapter(good)


def test_unknown_config_keys_of_a_newer_peft_are_passed_over(good: Path, base_layers: tuple[Shapes, str | None]) -> None:
    edit_config(good, field_of_tomorrow=1)
    assert read_adapter(good, *base_layers).modules


def test_weights_are_missing(good: Path) -> None:
    (good / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=r"missing weights: no adapter_model\.safetensors"):
        read_adapter(good)


def test_pickle_is_never_opened(good: Path) -> None:
    (good / WEIGHTS_FILE).rename(good / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle: adapter_model\.bin is never opened"):
        read_adapter(good)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_weights_are_corrupt(keep: int, good: Path) -> None:
    path = good / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="corrupt weights"):
        read_adapter(good)


def test_weights_that_are_noise_are_corrupt(good: Path) -> None:
    (good / WEIGHTS_FILE).write_bytes(b"\x93" * 5000)
    with pytest.raises(AdapterError, match="corrupt weights"):
        read_adapter(good)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q0_A, Q0_B])
def test_nan_and_infinity_are_found_in_either_factor(
    value: float, name: str, good: Path, base_layers: tuple[Shapes, str | None]
) -> None:
    edit_weights(good, lambda tensors: tensors[name].view(-1).__setitem__(7, value))
    with pytest.raises(AdapterError, match=f"NaN or Inf in the weights of {Q0}"):
        read_and_check(good, base_layers)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: "module." + name,
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    ],
)
def test_names_of_wrapped_models_are_those_of_the_model(
    rename: Callable[[str], str], good: Path, base_layers: tuple[Shapes, str | None], tmp_path: Path
) -> None:
    expected = read_adapter(good, *base_layers)
    save_file({rename(name): tensor for name, tensor in load_file(good / WEIGHTS_FILE).items()}, good / WEIGHTS_FILE)
    assert read_adapter(good, *base_layers).modules == expected.modules
    plain = for_engine(good, tmp_path / "plain")
    assert plain != good
    assert read_adapter(plain).modules == expected.modules


EXPERT = "base_model.model.model.layers.0.mlp.experts.0.w1"

TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no tensor": (lambda t: t.clear(), "holds no tensor"),
    "only lora_A": (lambda t: t.pop(Q0_B), "has only lora_A"),
    "a module less than the config names": (lambda t: (t.pop(Q0_A), t.pop(Q0_B)), f"missing weights: .*{Q0}"),
    "magnitude vector": (lambda t: t.update({f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(2)}), "DoRA"),
    "embedding factors": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 2)}),
        "weights for model.embed_tokens, which its config does not target",
    ),
    "a factor under two names": (
        lambda t: t.update({Q0_A.replace(".weight", ".default.weight"): torch.ones(4, 128)}),
        f"{Q0} has lora_A twice, under two names",
    ),
    "output head": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)}),
        "weights for lm_head, which",
    ),
    "bias": (lambda t: t.update({f"base_model.model.{Q0}.lora_B.bias": torch.ones(128)}), "not plain LoRA: .*bias"),
    "other prefix": (lambda t: t.update({"transformer.q.lora_A.weight": torch.ones(4, 128)}), "not plain LoRA"),
    "whole numbers": (lambda t: t.update({Q0_A: torch.ones(4, 128, dtype=torch.int8)}), "dtype I8"),
    "a layer too many": (
        lambda t: t.update({name.replace("layers.0", "layers.7"): tensor.clone() for name, tensor in list(t.items())}),
        "wrong base: it adapts model.layers.7",
    ),
    "experts": (
        lambda t: t.update({f"{EXPERT}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        "adapts expert layers .* which are not supported",
    ),
    "experts of a model within another": (
        lambda t: (
            t.update({name.replace("model.layers", "language_model.model.layers"): t.pop(name) for name in list(t)}),
            t.update({f"{EXPERT}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        ),
        "adapts expert layers",
    ),
    "a router": (
        lambda t: t.update({f"{EXPERT[:-13]}.gate.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        r"adapts the router to expert layers \(model.layers.0.mlp.gate\)",
    ),
    "layers for pictures alone": (
        lambda t: [t.update({name.replace("model.layers", "vision_tower.layers"): t.pop(name)}) for name in list(t)],
        "adapts layers for pictures or sounds alone",
    ),
    "wider input": (lambda t: t.update({Q0_A: torch.ones(4, 256)}), "wrong shapes"),
    "wider output": (lambda t: t.update({Q0_B: torch.ones(256, 4)}), "wrong shapes"),
    "other rank": (lambda t: t.update({Q0_A: torch.ones(5, 128), Q0_B: torch.ones(128, 5)}), "wrong shapes"),
    "a vector for a matrix": (lambda t: t.update({Q0_A: torch.ones(4)}), "wrong shapes"),
    "a scalar for a matrix": (lambda t: t.update({Q0_A: torch.tensor(1.0)}), "wrong shapes"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_that_cannot_be_a_donor_are_set_aside(case: str, good: Path, base_layers: tuple[Shapes, str | None]) -> None:
    change, reason = TENSORS[case]
    edit_weights(good, change)
    with pytest.raises(AdapterError, match=reason):
        read_and_check(good, base_layers)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_kinds_of_lora_that_peft_wrote_and_are_not_a_low_rank_delta(
    overrides: dict[str, Any], reason: str, tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError, match=reason):
        read_adapter(make_adapter(tmp_path, tiny_base, **overrides))


def test_at_another_rank_the_scale_falls_with_the_root_of_the_rank() -> None:
    assert alpha_at(8, 8, 2.0) == 16
    assert alpha_at(32, 8, 2.0) == 32
    assert alpha_at(2, 8, 2.0) == pytest.approx(8)


def test_an_adapter_is_read_to_the_device_of_its_base(good: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT by itself takes the first GPU that a process sees."""
    asked: list[str] = []
    read = PeftModel.from_pretrained

    def note(model: Any, folder: str, torch_device: str) -> PeftModel:
        asked.append(torch_device)
        return read(model, folder, torch_device="cpu")

    monkeypatch.setattr(PeftModel, "from_pretrained", note)
    put_on(AutoModelForCausalLM.from_pretrained(tiny_base).to("meta"), good, tiny_base)
    assert asked == ["meta"]


def test_what_an_adapter_adds_to_a_layer_that_changes_whole_is_added_there(good: Path, tiny_base: str) -> None:
    adapter, norm = read_adapter(good), {"model.norm.weight": torch.ones(128)}
    assert with_whole(adapter, norm, tiny_base).tensors is adapter.tensors
    for own in (f"{Q0}.weight", f"{Q0}.bias"):
        delta = adapter.factors(Q0).dense()
        found = with_whole(adapter, norm | {own: torch.ones(delta.shape)}, tiny_base)
        assert found.config.target_modules == {*found.modules} == {*adapter.modules} - {Q0}
        torch.testing.assert_close(found.whole[f"{Q0}.weight"], delta + float(own.endswith("weight")))


def test_peft_reads_a_layer_with_a_bias_of_which_the_weight_alone_changed(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    base, sizes = str(tmp_path / "base"), {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=64, num_attention_heads=2, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(base)
    donor = make_adapter(tmp_path / "donor", base, std=0.2, targets=["q_proj", "lm_head"])
    read = read_adapter(donor, base=base)
    assert about_saved(read_declared(donor), read.whole) == "lm_head beside it was trained, and is scored and merged whole"
    write_adapter(tmp_path / "again", read, base=base)
    theirs, ours = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        .eval()(torch.arange(3, 20)[None])
        .logits
        for folder in (donor, tmp_path / "again")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
