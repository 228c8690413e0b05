"""An adapter that is trained on a base in 4 bits: against transformers and PEFT on the same base, and for the plain one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.config import TrainConfig
from pipeline.core.errors import InputError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.model.completion_loss import score_tokens
from pipeline.train.arm import Arm, Job
from pipeline.train.evaluate import Rows, as_metrics, causal, evaluate, evaluate_on_test
from pipeline.train.loop import Finetuning
from pipeline.train.quantised_base import load_quantised, require_bitsandbytes
from pipeline.train.worker_model import Trainable

pytestmark = pytest.mark.timeout(120)

MODULES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def start(tmp_path: Path, untied_base: str, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(tmp_path / "start", untied_base, rank=2, targets=MODULES, std=0.2)


@pytest.fixture
def rows(data: Folder) -> Rows:
    return Rows(data.read_table("validation.parquet"))


def quantised(job: Callable[..., Job], base: str, start: Path | None = None, folded: bool = False, **train: Any) -> Job:
    given = replace(job(quantize="nf4", **train), base=base)
    return replace(given, arm=Arm("mashup", 1e-2, 0), start=Folder.at(start), folded=folded) if start else given


def theirs(base: str, dtype: torch.dtype) -> Any:
    """The base in 4 bits, by the documented way of transformers and PEFT."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, dtype=dtype, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def loss_of(model: Any, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """transformers' own, of each row alone, summed over the learned tokens."""
    total = torch.zeros(())
    for ids, learn in zip(rows.ids, rows.learn, strict=True):
        labels = torch.tensor([ids]).masked_fill(~torch.tensor([learn]), -100)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total = total + model(input_ids=torch.tensor([ids]), labels=labels).loss * sum(learn[1:])
    return total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def nll_of(model: Any, rows: Rows) -> float:
    return as_metrics(evaluate(partial(score_tokens, model), rows))["eval_nll"]


def trained(job: Job, folder: Path) -> Finetuning:
    """A finetuning at its end; its last checkpoint is in the folder."""
    last: dict[str, Any] = {}
    finetuning = Finetuning(job, 0, 1, lambda metrics, snapshot: last.update(write=snapshot()))
    finetuning.run()
    folder.mkdir()
    last["write"](folder)
    return finetuning


def test_linear_layers_but_the_head_are_in_4_bits_and_the_rest_in_float32(untied_base: str) -> None:
    model = load_quantised(untied_base, torch.bfloat16)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, layer in linear.items() if not isinstance(layer, Linear4bit)} == {"lm_head"}
    four = [layer for layer in linear.values() if isinstance(layer, Linear4bit)]
    assert all(layer.weight.nbytes * 2 == layer.in_features * layer.out_features for layer in four)
    assert all(layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested for layer in four)
    assert {weight.dtype for weight in model.parameters()} == {torch.uint8, torch.float32}
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_and_gradients_are_those_of_transformers_and_peft(
    job: Callable[..., Job], untied_base: str, start: Path, rows: Rows, dtype: str, checkpointing: bool
) -> None:
    """From a mashup that is trained on, before and after an evaluation."""
    products = getattr(torch, dtype)
    ours = Trainable(quantised(job, untied_base, start, dtype=dtype, gradient_checkpointing=checkpointing), 1)
    model = PeftModel.from_pretrained(theirs(untied_base, products), str(start), is_trainable=True).train()
    expected = loss_of(model, rows, products)
    expected.backward()
    precise = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1}
    seen: list[torch.dtype] = []  # of what the head gives, which is in float32 itself
    ours.model.get_output_embeddings().register_forward_hook(lambda head, given, logits: seen.append(logits.dtype))
    for _ in range(2):
        loss = ours.loss(rows.batch(range(len(rows))))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5 if dtype == "float32" else 1e-2)
        got, wanted = gradients(ours.model), gradients(model)
        assert len(got) == 12
        for name in wanted.keys() | got.keys():
            scale = wanted[name].abs().max()
            torch.testing.assert_close(got[name] / scale, wanted[name] / scale, **precise)
        assert set(seen) == {products}
        ours.score(rows.batch(range(len(rows))))
        for weight in ours.weights:
            weight.grad = None


def test_an_adapter_of_the_head_is_trained_beside_layers_in_4_bits(job: Callable[..., Job], untied_base: str, rows: Rows) -> None:
    given = quantised(job, untied_base, dtype="bfloat16")
    ours = Trainable(replace(given, lora=replace(given.lora, target_modules=("q_proj", "lm_head"))), 1)
    ours.loss(rows.batch([0, 1])).backward()
    assert len(gradients(ours.model)) == 6
    assert float(ours.model.get_base_model().lm_head.lora_B["default"].weight.grad.abs().max()) > 0


def test_a_folded_start_is_added_before_the_base_is_quantised(
    job: Callable[..., Job], untied_base: str, start: Path, tmp_path: Path
) -> None:
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied_base), str(start)).merge_and_unload()
    plain.save_pretrained(tmp_path / "plain")
    expected, found = theirs(str(tmp_path / "plain"), torch.float32), load_quantised(untied_base, torch.float32, start)
    assert found.name_or_path == untied_base
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("folded", [None, False, True], ids=["base", "trained on", "folded"])
def test_a_checkpoint_is_an_adapter_for_the_plain_base_and_the_test_split_is_of_that(
    job: Callable[..., Job], data: Folder, untied_base: str, start: Path, tmp_path: Path, folded: bool | None
) -> None:
    """While validation is of what is trained: the same adapter on the base in 4 bits."""
    given = quantised(job, untied_base, None if folded is None else start, bool(folded), steps=4, evaluations=1)
    finetuning, checkpoint = trained(given, tmp_path / "trained"), tmp_path / "trained"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied_base), str(checkpoint))
    assert model.peft_config["default"].base_model_name_or_path == untied_base
    test, validation = (Rows(data.read_table(f"{split}.parquet")) for split in ("test", "validation"))
    found = evaluate_on_test(untied_base, "float32", data, Folder.at(checkpoint))
    assert found["test_nll"] == pytest.approx(nll_of(model.get_base_model(), test), abs=1e-5)
    if not folded:
        same = PeftModel.from_pretrained(load_quantised(untied_base, torch.float32), str(checkpoint)).get_base_model()
        assert finetuning.curve[-1]["eval_nll"] == pytest.approx(nll_of(same, validation), abs=1e-5)
    assert finetuning.curve[-1]["eval_nll"] != pytest.approx(nll_of(model.get_base_model(), validation), abs=1e-3)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_who_lacks_bitsandbytes_is_told_how_to_get_it(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_bitsandbytes(TrainConfig(quantize=quantize))
    monkeypatch.setattr("pipeline.train.quantised_base.is_bitsandbytes_available", lambda: False)
    if quantize == "none":
        require_bitsandbytes(TrainConfig(quantize=quantize))
    else:
        with pytest.raises(InputError, match=r"^install bitsandbytes to use train.quantize nf4: pip install '\.\[quantize\]'$"):
            require_bitsandbytes(TrainConfig(quantize=quantize))


@pytest.mark.parametrize("folded", [True, False])
def test_layers_that_a_start_saves_whole_are_put_in(
    folded: bool, job: Callable[..., Job], tiny_base: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    """Also where the base's head is tied to the embedding that changes: it stays the base's."""
    kind = {"targets": MODULES, "modules_to_save": ["embed_tokens", "model.norm"]}
    folder = make_adapter(tmp_path / "whole", tiny_base, whole=0.2, **kind)
    model, saved = causal(Trainable(quantised(job, tiny_base, folder, folded), 1).model), load_file(folder / WEIGHTS_FILE)
    weights = {"model.embed_tokens": model.get_input_embeddings().weight, "model.norm": model.model.norm.weight}
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), saved[f"base_model.model.{name}.weight"], atol=1e-6, rtol=0)
    head = AutoModelForCausalLM.from_pretrained(tiny_base).lm_head.weight
    torch.testing.assert_close(model.get_output_embeddings().weight.detach(), head.detach())
