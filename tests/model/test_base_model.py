"""The base model: its linear layers from the config alone, its tokenizer, and messages for a wrong one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.core.errors import InputError
from pipeline.model import base_model
from pipeline.model.base_model import count_parameters, fast_dtype, fingerprint, linear_shapes, load_model, load_tokenizer


@pytest.mark.parametrize("base", ["tiny_base", "untied_base"])
def test_shapes_are_those_of_the_loaded_model(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    shapes, head = linear_shapes(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shapes == expected
    assert head == "lm_head"
    assert count_parameters(folder) == sum(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize("base", ["/no/such/folder", "./nothing-here", "org/name/more"])
def test_missing_folder_is_an_input_error(base: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        linear_shapes(base)


def test_unknown_hub_id_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no-such-org/no-such-model: unknown base model"):
        linear_shapes("no-such-org/no-such-model")


def test_folder_without_a_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown base model"):
        load_tokenizer(str(tmp_path))


def test_slow_tokenizer_is_an_input_error(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_cached_tokenizer", lambda base: PreTrainedTokenizerBase())
    monkeypatch.setattr(PreTrainedTokenizerBase, "is_fast", False, raising=False)
    with pytest.raises(InputError, match="no fast version"):
        load_tokenizer(tiny_base)


def test_model_is_loaded_in_evaluation_mode_and_in_the_wished_dtype(tiny_base: str) -> None:
    model = load_model(tiny_base, torch.bfloat16)
    assert not model.training
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shared_out", [False, True])
def test_weights_are_read_straight_to_where_they_go(tiny_base: str, monkeypatch: pytest.MonkeyPatch, shared_out: bool) -> None:
    given: list[Any] = []

    class Model:
        def eval(self) -> "Model":
            return self

    monkeypatch.setattr(base_model, "device", lambda: torch.device("cuda"))
    loaded = lambda base, **settings: given.append(settings["device_map"]) or Model()  # noqa: E731
    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", loaded)
    load_model(tiny_base, torch.bfloat16, shared_out=shared_out)
    assert given == ["auto" if shared_out else {"": torch.device("cuda")}]


def test_dtype_auto_is_one_that_the_hardware_multiplies() -> None:
    assert fast_dtype("float32") == torch.float32
    assert fast_dtype("auto") in (torch.float32, torch.bfloat16)


def harm(kind: str, base: Path) -> None:
    """A base folder with something wrong."""
    config = json.loads((base / "config.json").read_text())
    weights = base / "model.safetensors"
    if kind == "code of its own":
        (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')")
        (base / "config.json").write_text(json.dumps({"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "evil.M"}}))
    elif kind == "an adapter beside it":
        (base / "adapter_config.json").write_text("{}")
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "a tokenizer that is a list":
        (base / "tokenizer_config.json").write_text("[]")
    else:
        values = {
            "encoder and decoder": {"model_type": "t5"},
            "both directions": {"model_type": "bert"},
            "odd": {"hidden_size": "x"},
        }
        (base / "config.json").write_text(json.dumps(config | values[kind]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code of its own", "not a causal language model"),
        ("an adapter beside it", "also holds an adapter"),
        ("cut short", "model.safetensors: these weights of the base model cannot be read"),
        ("no weights", "it has no weights"),
        ("a tokenizer that is a list", "unknown base model"),
        ("encoder and decoder", "not a causal language model"),
        ("both directions", "a bert reads in both directions"),
        ("odd", "unknown base model"),
    ],
)
def test_a_base_that_is_none_is_an_input_error_and_runs_no_code(
    kind: str, message: str, tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to be asked whether code may run
    harm(kind, base)
    with pytest.raises(InputError, match=message):
        (linear_shapes(str(base)), fingerprint(str(base)), load_tokenizer(str(base)))
    assert not (base / "ran").exists()
