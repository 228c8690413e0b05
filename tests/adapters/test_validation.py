"""What a stranger's files may declare: bounds on sizes and time, and what is never done."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import edit_config
from safetensors.torch import save_file

from pipeline.adapters.adapter import for_engine, read_adapter
from pipeline.adapters.validation import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, open_weights, read_declared
from pipeline.config import MAX_RANK
from pipeline.core.errors import MAX_REASON, AdapterError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.model.base_model import Shapes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"exclude_modules": [1]}, "exclude_modules"),
        ({"r": MAX_RANK + 1}, f"from 1 to {MAX_RANK}"),
        ({"rank_pattern": {"q_proj": 2**40}}, f"from 1 to {MAX_RANK}"),
        ({"rank_pattern": {"q_proj": 2.5}}, "whole numbers"),
        ({"lora_dropout": 7}, "lora_dropout is 7"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x'"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"base_model_name_or_path": "\ud800"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": 0}, "base_model_name_or_path"),
        ({"base_model_name_or_path": []}, "base_model_name_or_path"),
        ({"lora_alpha": 1e9}, "a number below 1e"),
        ({"base_model_name_or_path": "a\x1b[31m"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "x" * 301}, "base_model_name_or_path"),
        ({"init_lora_weights": "OLoRA"}, "it changes the base weights"),
        ({"init_lora_weights": "lora_ga"}, "it changes the base weights"),
        ({"target_modules": ["q_proj"]}, "v_proj, which its config does not target"),
        ({"layers_to_transform": [0]}, "layers.1.*, which its config does not target"),
        ({"auto_mapping": {"parent_library": "os"}, "note": "x" * MAX_CONFIG_BYTES}, "bytes; .* are allowed"),
    ],
)
def test_fields_are_bounded(changes: dict[str, Any], reason: str, good: Path, base_layers: tuple[Shapes, str | None]) -> None:
    edit_config(good, **changes)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(good, *base_layers)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_in_another_encoding_is_refused(encoding: str, good: Path) -> None:
    """Python's JSON reads it, PEFT and vLLM do not."""
    (good / CONFIG_FILE).write_text((good / CONFIG_FILE).read_text(), encoding)
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_declared(good)


def test_a_key_that_stands_there_twice_is_refused(good: Path) -> None:
    text = (good / CONFIG_FILE).read_text().rstrip()
    (good / CONFIG_FILE).write_text(f'{text[:-1]}, "lora_alpha": 800}}')
    with pytest.raises(AdapterError, match="a key stands there twice"):
        read_declared(good)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"lora_dropout": 0.05, "inference_mode": True}, True),
        ({"init_lora_weights": "gaussian"}, False),
        ({"task_type": "SEQ_CLS"}, False),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, False),
        ({"eva_config": {"rho": 2.0}}, False),
    ],
)
def test_no_engine_sees_a_field_that_nobody_checked(
    changes: dict[str, Any], seen: bool, good: Path, base_layers: tuple[Shapes, str | None], tmp_path: Path
) -> None:
    edit_config(good, **changes)
    read_adapter(good, *base_layers)
    given = for_engine(good, tmp_path / "scratch")
    assert (given == good) == seen
    content = json.loads((given / CONFIG_FILE).read_text())
    assert seen or all(content.get(name) != value for name, value in changes.items())


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_larger_than_any_honest_one_is_not_read(length: int, good: Path) -> None:
    with (good / WEIGHTS_FILE).open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(min(length, 1 << 36))  # sparse
    with pytest.raises(AdapterError, match=f"declares a header of {length} bytes"):
        read_declared(good)


def test_weights_that_do_not_fit_the_base_are_refused_before_memory_is_taken(
    good: Path, base_layers: tuple[Shapes, str | None]
) -> None:
    """Half a gigabyte of them."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 1 << 25), name.format("B"): torch.zeros(128, 4)}, good / WEIGHTS_FILE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match="wrong shapes"):
        read_adapter(good, *base_layers)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_other_types_of_numbers_are_refused(dtype: torch.dtype, good: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format(half): torch.zeros(4, 4).to(dtype) for half in "AB"}, good / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="has dtype"):
        read_declared(good)


def test_a_reason_is_short_and_has_no_control_characters(good: Path) -> None:
    edit_config(good, peft_type="\x1b[31m\n" + "x" * 5000)
    with pytest.raises(AdapterError) as refused:
        read_declared(good)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= MAX_REASON + 3


def test_a_pipe_is_not_waited_for(good: Path) -> None:
    (good / WEIGHTS_FILE).unlink()
    os.mkfifo(good / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="missing weights"):
        read_declared(good)
    with pytest.raises(AdapterError, match="is no file"):
        open_weights(good / WEIGHTS_FILE)
