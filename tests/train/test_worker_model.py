"""What a worker of all weights computes in, where workers share them out. One process is a group of one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import distributed, nn
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import read_adapter, write_adapter
from pipeline.adapters.validation import read_declared
from pipeline.core.storage import Folder
from pipeline.model.completion_loss import collate, score_tokens
from pipeline.model.layer_names import is_of_text
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.evaluate import Rows
from pipeline.train.worker_model import BUCKET, Trainable, _buckets, trained


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.distributed.get_node_local_rank", lambda: 0)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("shard", [True, False])
def test_weights_that_are_shared_out_are_gathered_in_the_type_of_the_products(
    job: Callable[..., Job], data: Folder, shard: bool
) -> None:
    """Their gradients are summed in float32, and autocast has nothing to cast; a worker with all of them uses autocast."""
    trainable = Trainable(job(method="full", dtype="bfloat16", shard=shard), 1)
    seen: list[tuple[torch.dtype, bool]] = []

    def note(layer: nn.Module, given: Any) -> None:
        seen.append((layer.weight.dtype, torch.is_autocast_enabled("cpu")))

    trainable.model.get_decoder().layers[0].mlp.up_proj.register_forward_pre_hook(note)
    batch = Rows(data.read_table("validation.parquet")).widest(64)
    trainable.loss(batch).backward()
    assert seen == [(torch.bfloat16, False) if shard else (torch.float32, True)]
    assert {weight.dtype for weight in trainable.weights} == {torch.float32}
    assert {weight.grad.dtype for weight in trainable.weights} == {torch.float32}
    exact = Trainable(job(method="full", dtype="float32"), 1)
    assert float(trainable.loss(batch)) == pytest.approx(float(exact.loss(batch)), rel=2e-2)
    assert trainable.moment_bytes() == exact.moment_bytes() == sum(8 * weight.numel() for weight in exact.weights)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("shard", "passes"), [(True, 1), (False, 2)])
def test_workers_that_share_the_weights_out_run_the_decoder_as_often_as_each_other(
    job: Callable[..., Job], shard: bool, passes: int
) -> None:
    """Whatever their rows begin with: one that ran it once more waits for ever, and so do the others."""
    trainable, seen = Trainable(job(shard=shard), 1), list[int]()
    layer = trainable.model.get_base_model().get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    ids = [[*range(5, 25), last] for last in range(30, 38)]
    batch = collate(ids, [[False] * 20 + [True]] * 8, torch.device("cpu"))
    assert batch.n_shared == 19
    trainable.score(batch)
    trainable.loss(batch)
    assert len(seen) == 2 * passes


def test_gradients_are_summed_in_parts_of_bounded_size() -> None:
    sizes = [BUCKET // 2, BUCKET // 2, 1, BUCKET + 1, 3, 4]
    made = [torch.empty(size, device="meta") for size in sizes]
    assert [[tensor.numel() for tensor in bucket] for bucket in _buckets(made)] == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


def test_a_fresh_adapter_lies_on_layers_of_text_alone(job: Callable[..., Job], seeing_base: str, tmp_path: Path) -> None:
    """An encoder for pictures has layers of the same names, which no text would train."""
    trainable = Trainable(replace(job(), base=seeing_base, lora=Lora(4, 8.0, ("q_proj", "v_proj"))), 1)
    learning = [name for name, weight in trainable.model.named_parameters() if weight.requires_grad]
    assert len(learning) == 8
    assert all(is_of_text(name) for name in learning)
    trainable.save(tmp_path, trainable.trained(rank=0))
    assert not read_declared(tmp_path).other_senses


KINDS = {
    "vocabulary": {"targets": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
    "a layer that is trained": {"targets": ["q_proj", "down_proj"], "modules_to_save": ["v_proj"]},
}


@pytest.fixture(params=KINDS)
def start(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Path:
    """An adapter with layers that are saved whole, as a merge writes it."""
    kind: dict[str, Any] = KINDS[request.param]
    donor = make_adapter(tmp_path / "donor", tiny_base, std=0.2, whole=0.2, **kind)
    write_adapter(tmp_path / "start", read_adapter(donor, base=tiny_base), base=tiny_base)
    return tmp_path / "start"


def by_peft(base: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).get_base_model()


@pytest.mark.parametrize(("method", "folded"), [("lora", False), ("lora", True), ("full", True)])
def test_whole_layers_of_a_start_are_in_what_is_trained_and_in_what_that_leaves(
    method: str, folded: bool, job: Callable[..., Job], data: Folder, start: Path, tiny_base: str, tmp_path: Path
) -> None:
    arm = replace(job(method=method), arm=Arm("mashup", 1e-3, 0), start=Folder.at(start), folded=folded)
    trainable, batch = Trainable(arm, 1), Rows(data.read_table("validation.parquet")).widest(64)
    expected, _ = score_tokens(by_peft(tiny_base, start), batch)
    torch.testing.assert_close(trainable.score(batch)[0], expected, rtol=1e-3, atol=1e-3)
    plain, _ = score_tokens(AutoModelForCausalLM.from_pretrained(tiny_base), batch)
    assert (expected - plain).abs().max() > 0.1

    trainable.loss(batch).backward()
    with torch.no_grad():
        for weight in trainable.weights:
            weight -= 1e-3 * weight.grad
    after = trainable.score(batch)[0]
    assert (after - expected).abs().max() > 1e-4
    trainable.save(tmp_path / "left", trainable.trained(rank=0))
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "left") if arm.full else by_peft(tiny_base, tmp_path / "left")
    torch.testing.assert_close(score_tokens(left, batch)[0], after, rtol=1e-3, atol=1e-3)
    again = trained(arm, Folder.at(tmp_path / "left"), 1)
    torch.testing.assert_close(again.score(batch)[0], after, rtol=1e-3, atol=1e-3)


def test_whole_layers_of_a_start_stay_as_they_are(job: Callable[..., Job], start: Path) -> None:
    trainable = Trainable(replace(job(), arm=Arm("mashup", 1e-3, 0), start=Folder.at(start)), 1)
    learning = [name for name, weight in trainable.model.named_parameters() if weight.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning)
