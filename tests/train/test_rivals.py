"""Starts without donors: as PEFT begins them, plain on disk, and the base before any step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import Adapter, read_adapter
from pipeline.config import MOVED, RIVALS
from pipeline.core.storage import Folder
from pipeline.model.completion_loss import score_tokens
from pipeline.train.arm import SECONDS_FILE, Arm, Job, Lora
from pipeline.train.evaluate import Rows, as_metrics, evaluate, evaluate_on_test
from pipeline.train.loop import Finetuning
from pipeline.train.rivals import write_rival

LORA = Lora(4, 8.0, ("down_proj", "q_proj", "v_proj"))
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def made(job: Callable[..., Job], data: Folder, tmp_path: Path) -> Callable[..., Adapter]:
    """made(init, rows): such a start for the tiny base, with so many rows of the sample; written below tmp_path."""

    def make(init: str, rows: int = 16) -> Adapter:
        sample: pa.Table = data.read_table("train.parquet").slice(0, rows)
        write_rival(init, job().base, "float32", LORA, sample, Folder.at(tmp_path))
        return read_adapter(tmp_path / init)

    return make


def weight_of(job: Callable[..., Job]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(job().base)
    return model.get_submodule(LAYER).weight.detach()


def rival(job: Job, init: str, folder: Path) -> Job:
    return replace(job, arm=Arm(init, 1e-3, 0), start=Folder.at(folder / init), lora=LORA, moved=init in MOVED)


@pytest.mark.parametrize("init", RIVALS)
def test_before_any_step_it_is_the_base_and_after_training_a_plain_adapter_of_it(
    init: str, made: Callable[..., Adapter], job: Callable[..., Job], data: Folder, tmp_path: Path
) -> None:
    adapter = made(init)
    assert adapter.config.init_lora_weights is True  # else it would begin anew wherever it is loaded
    assert float(Folder.at(tmp_path / init).read_json(SECONDS_FILE)) > 0
    delta = adapter.factors(LAYER)
    assert (float((delta.b_OR @ delta.a_RI).norm()) > 0) == (init in MOVED)
    settings = {"steps": 4, "evaluations": 2, "learning_rates": (1e-3,)}
    finetuning = Finetuning(rival(job(**settings), init, tmp_path), 0, 1, lambda *_: None)
    finetuning.run()
    start, _, end = (point["eval_nll"] for point in finetuning.curve)
    base = AutoModelForCausalLM.from_pretrained(job().base)
    rows = Rows(data.read_table("validation.parquet"))
    assert start == pytest.approx(as_metrics(evaluate(partial(score_tokens, base), rows))["eval_nll"], abs=1e-4)
    assert end < start
    finetuning.trainable.save(tmp_path / "saved", finetuning.trainable.trained(rank=0))
    assert read_adapter(tmp_path / "saved").max_rank == LORA.rank * (2 if init in MOVED else 1)
    found = evaluate_on_test(job().base, "float32", data, Folder.at(tmp_path / "saved"))
    test = Rows(data.read_table("test.parquet"))
    assert found["test_nll"] == pytest.approx(as_metrics(evaluate(finetuning.trainable.score, test))["eval_nll"], abs=1e-4)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "saved")).get_base_model()
    assert as_metrics(evaluate(partial(score_tokens, plain), test))["eval_nll"] == pytest.approx(found["test_nll"], abs=1e-4)


@pytest.mark.parametrize("init", MOVED)
def test_going_on_from_a_checkpoint_gives_the_same_curve(
    init: str, made: Callable[..., Adapter], job: Callable[..., Job], without_time: Callable[..., object], tmp_path: Path
) -> None:
    made(init)
    arm = rival(job(steps=4, evaluations=2), init, tmp_path)

    def keep(metrics: dict[str, float], snapshot: Callable[[], Callable[[Path], None]]) -> None:
        folder = tmp_path / f"kept-{metrics['step']}"
        folder.mkdir()
        snapshot()(folder)

    whole = Finetuning(arm, 0, 1, keep)
    whole.run()
    again = Finetuning(arm, 0, 1, lambda *_: None)
    again.restore(tmp_path / "kept-2")
    again.run()
    assert without_time(again.curve) == without_time(whole.curve)


def test_pissa_is_the_best_approximation_of_the_weights(made: Callable[..., Adapter], job: Callable[..., Job]) -> None:
    """By the singular value decomposition (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(weight_of(job), full_matrices=False)
    delta = made("pissa").factors(LAYER)
    best = u[:, : LORA.rank] @ torch.diag(s[: LORA.rank]) @ vh[: LORA.rank]
    assert torch.allclose(delta.b_OR @ delta.a_RI, best, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "reads"), [("pissa", False), ("olora", False), ("corda", True), ("lora_ga", True), ("eva", True)]
)
def test_only_those_that_say_so_read_the_sample(init: str, reads: bool, made: Callable[..., Adapter]) -> None:
    few, more = (made(init, rows).tensors[LAYER][0] for rows in (8, 16))
    assert torch.equal(few, more) != reads
    assert torch.equal(made(init, 16).tensors[LAYER][0], more)  # the same again


def test_eva_is_what_enters_a_layer(made: Callable[..., Adapter], job: Callable[..., Job], data: Folder) -> None:
    """Its rows span the largest principal directions of the layer's inputs at learned tokens."""
    a_RI = made("eva").tensors[LAYER][0]
    model, seen = AutoModelForCausalLM.from_pretrained(job().base), list[torch.Tensor]()
    model.get_submodule(LAYER).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    rows = data.read_table("train.parquet").slice(0, 16).to_pylist()
    inputs = []
    for row in rows:
        seen.clear()
        model(torch.tensor([row["input_ids"]]))
        inputs.append(seen[0][torch.tensor(row["learn_mask"])])
    spread = torch.cat(inputs).detach()
    spread -= spread.mean(dim=0)
    best = torch.linalg.svd(spread, full_matrices=False)[2][: LORA.rank]
    ours = torch.linalg.qr(a_RI.T)[0].T
    assert float((spread @ ours.T).norm()) > 0.98 * float((spread @ best.T).norm())
