"""The base model: its linear layers from the config alone, its tokenizer, and messages for a wrong one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import COMMIT, serve_hub
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from pipeline.core.base_ref import pinned
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.model import base_model
from pipeline.model.base_model import (
    class_name,
    context_length,
    count_parameters,
    fast_dtype,
    fingerprint,
    language_part,
    linear_shapes,
    load_model,
    load_tokenizer,
    model_type,
    names_of_others,
)


@pytest.mark.parametrize("base", ["tiny_base", "untied_base"])
def test_shapes_are_those_of_the_loaded_model(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    shapes, head = linear_shapes(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shapes == expected
    assert head == "lm_head"
    assert count_parameters(folder) == sum(weights.numel() for weights in model.parameters())


def test_names_of_layers_of_other_kinds_are_known(tiny_base: str) -> None:
    assert {"0", "1", "layers", "self_attn", "norm", "embed_tokens"} <= names_of_others(tiny_base)
    assert names_of_others(tiny_base).isdisjoint({"q_proj", "down_proj", "lm_head"})


def test_its_class_is_the_one_that_its_config_names_or_else_its_type(tiny_base: str, tmp_path: Path) -> None:
    assert (class_name(tiny_base), model_type(tiny_base)) == ("LlamaForCausalLM", "llama")
    config = json.loads((Path(tiny_base) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert class_name(str(tmp_path)) == "llama"


def test_a_language_model_that_is_a_part_has_its_own_context_and_place(tiny_base: str, tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77}).save_pretrained(tmp_path)
    assert (language_part(str(tmp_path)), context_length(str(tmp_path))) == ("text_config", 77)
    assert (language_part(tiny_base), context_length(tiny_base)) == (None, 512)


@pytest.mark.parametrize("name", ["Llama-3.2-1B-unsloth-bnb-4bit", "Llama-3.2-1B-GPTQ-Int4", "Llama-3.2-1B"])
def test_a_quantised_base_is_said_before_anything_starts(name: str, tiny_base: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, folder := tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    other = "" if name == "Llama-3.2-1B" else r", such as .*Llama-3.2-1B$"
    with pytest.raises(InputError, match=rf"its weights are quantised \(bitsandbytes\); give the base in 16 bits{other}"):
        linear_shapes(str(folder))


@pytest.fixture
def stored_base(tiny_base: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The base in an object store, among other files, and a disk of one's own for what is fetched."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Folder.at(bucket)
    store.upload(Path(tiny_base), "base")
    store.write_bytes("base/training_args.bin", b"pickle")
    return pinned(f"{bucket}/base")


def fetched(disk: Path) -> list[list[str]]:
    """What lies of bases on a disk."""
    return sorted(sorted(file.name for file in folder.iterdir()) for folder in disk.glob("mashup-bases-*/*"))


def test_a_base_of_an_object_store_is_the_local_one_and_fetched_once(stored_base: str, tiny_base: str, tmp_path: Path) -> None:
    assert linear_shapes(stored_base) == linear_shapes(tiny_base)
    assert load_tokenizer(stored_base).get_vocab() == load_tokenizer(tiny_base).get_vocab()
    (described,) = fetched(tmp_path)
    assert "config.json" in described
    assert not [name for name in described if name.endswith((".safetensors", ".bin"))]
    ids = torch.tensor([[5, 6, 7]])
    model, local = (load_model(base, torch.float32) for base in (stored_base, tiny_base))
    assert torch.equal(model(ids).logits, local(ids).logits)
    assert model.name_or_path == stored_base.partition("@")[0]
    found = fetched(tmp_path)
    assert sum("model.safetensors" in names for names in found) == 1
    for folder in tmp_path.glob("mashup-bases-*/*"):
        (folder / "mark").touch()
    code = f"from pipeline.model.base_model import weights_folder; print((weights_folder({stored_base!r}) / 'mark').exists())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr


def test_a_base_of_the_hub_is_told_by_its_commit(tiny_base: str, tmp_path: Path) -> None:
    code = """
import sys
from pipeline.model.base_model import fingerprint, linear_shapes
for base in sys.argv[1:]:
    print(fingerprint(base), len(linear_shapes(base)[0]))
"""
    files = {file.name: file.read_bytes() for file in Path(tiny_base).iterdir()}
    with serve_hub({"org/base": files}) as (endpoint, _):
        there = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", code, "org/base", f"org/base@{COMMIT}"]
        done = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    expected = f"{base_model._short(f'org/base {COMMIT}'.encode())} {len(linear_shapes(tiny_base)[0])}"
    assert done.stdout.splitlines() == [expected] * 2, done.stderr


def test_a_base_of_an_object_store_that_changes_during_a_run_is_refused(stored_base: str) -> None:
    first = fingerprint(stored_base)
    name = stored_base.partition("@")[0]
    Folder.at(name).write_text("generation_config.json", "{}")
    assert fingerprint(pinned(name)) != first
    with pytest.raises(InputError, match="has changed since the run began"):
        load_model(stored_base, torch.float32)


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
        config = LlamaConfig()

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
