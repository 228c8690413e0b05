"""The base model: its linear layers from the config alone, its tokenizer, and messages for a wrong one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline import basemodel
from pipeline.basemodel import count_parameters, fast_dtype, linear_shapes, load_model, load_tokenizer
from pipeline.errors import InputError


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
    monkeypatch.setattr(basemodel, "_cached_tokenizer", lambda base: PreTrainedTokenizerBase())
    monkeypatch.setattr(PreTrainedTokenizerBase, "is_fast", False, raising=False)
    with pytest.raises(InputError, match="no fast version"):
        load_tokenizer(tiny_base)


def test_model_is_loaded_in_evaluation_mode_and_in_the_wished_dtype(tiny_base: str) -> None:
    model = load_model(tiny_base, torch.bfloat16)
    assert not model.training
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_dtype_auto_is_one_that_the_hardware_multiplies() -> None:
    assert fast_dtype("float32") == torch.float32
    assert fast_dtype("auto") in (torch.float32, torch.bfloat16)
