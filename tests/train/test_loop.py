"""The training loop: its order, its loss, going on from a checkpoint."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.core.storage import Folder
from pipeline.model.completion_loss import Batch, collate, score_tokens
from pipeline.train import loop
from pipeline.train.arm import CURVE_FILE, STATE, Arm, Job
from pipeline.train.batches import row_numbers
from pipeline.train.evaluate import Rows, Score, as_metrics, evaluate, evaluate_on_test
from pipeline.train.loop import Finetuning, Write, evaluation_steps

FULL = {"method": "full", "steps": 4, "evaluations": 2}


class Checkpoints:
    """Stands in for Ray: keeps what a loop reports."""

    def __init__(self, folder: Path):
        self.folder, self.points = folder, []

    def __call__(self, metrics: dict[str, Any], snapshot: Callable[[], Write | None]) -> None:
        self.points.append(metrics)
        write = snapshot()
        assert write
        folder = self.folder / str(metrics["step"])
        folder.mkdir(parents=True)
        write(folder)


def scoring(model: Any) -> Score:
    return partial(score_tokens, model)


def test_evaluations_are_at_the_start_and_evenly_to_the_end() -> None:
    assert evaluation_steps(24, 6) == [0, 4, 8, 12, 16, 20, 24]
    assert evaluation_steps(3, 10) == [0, 1, 2, 3]


def test_training_learns_and_reports_every_evaluation(job: Callable[..., Job], tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    Finetuning(job(), 0, 1, kept).run()
    assert [point["step"] for point in kept.points] == [0, 2, 4, 6, 8]
    assert kept.points[-1]["eval_nll"] < kept.points[0]["eval_nll"] - 0.3
    assert kept.points[-1]["tokens"] > 0


def test_first_loss_equals_that_of_transformers(job: Callable[..., Job], data: Folder, tmp_path: Path) -> None:
    """The mean NLL over the learned tokens of the first batch, as transformers' own loss gives it with labels."""
    kept = Checkpoints(tmp_path)
    Finetuning(job(steps=1, evaluations=1), 0, 1, kept).run()
    rows = data.read_table("train.parquet")
    model = AutoModelForCausalLM.from_pretrained(job().base)
    total, count = 0.0, 0
    for row in row_numbers(0, 1, 8, len(rows), 0).tolist():
        ids, learn = (torch.tensor([rows[name][row].as_py()]) for name in ("input_ids", "learn_mask"))
        labels = ids.masked_fill(~learn, -100)
        total += model(ids, labels=labels).loss.item() * int(learn[:, 1:].sum())
        count += int(learn[:, 1:].sum())
    assert kept.points[1]["train_nll"] == pytest.approx(total / count, abs=1e-5)


def test_going_on_from_a_checkpoint_gives_the_same_curve(job: Callable[..., Job], without_time: Any, tmp_path: Path) -> None:
    whole = Checkpoints(tmp_path / "whole")
    Finetuning(job(), 0, 1, whole).run()
    resumed = Checkpoints(tmp_path / "resumed")
    again = Finetuning(job(), 0, 1, resumed)
    again.restore(tmp_path / "whole" / "4")
    evaluated = json.loads((tmp_path / "whole/4" / CURVE_FILE).read_text())["evaluation_seconds"]
    assert again.evaluating == evaluated > 0
    again.run()
    assert again.evaluating > evaluated
    assert [point["step"] for point in resumed.points] == [6, 8]
    assert without_time(again.curve) == without_time([{"lr": 1e-2, "seed": 0, **point} for point in whole.points])


@pytest.mark.parametrize(
    "settings",
    [{"steps": 4, "evaluations": 2}, {"steps": 4, "evaluations": 2, "quantize": "nf4"}, FULL],
    ids=["adapter", "adapter of a base in 4 bits", "all weights"],
)
def test_a_checkpoint_can_be_written_after_training_went_on(
    job: Callable[..., Job], without_time: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    taken: dict[int, Any] = {}
    whole = Finetuning(job(**settings), 0, 1, lambda metrics, snapshot: taken.update({metrics["step"]: snapshot()}))
    whole.run()
    taken[2](tmp_path)
    again = Finetuning(job(**settings), 0, 1, lambda metrics, snapshot: None)
    again.restore(tmp_path)
    again.run()
    assert without_time(again.curve) == without_time(whole.curve)


def test_a_checkpoint_holds_nothing_that_is_frozen(job: Callable[..., Job], tmp_path: Path) -> None:
    finetuning = Finetuning(job(steps=1, evaluations=1), 0, 1, Checkpoints(tmp_path))
    finetuning.run()
    assert finetuning.trainable.model.config.tie_word_embeddings  # the head is listed beside the embedding
    state = torch.load(tmp_path / "1" / f"{STATE}-0.pt", weights_only=True)
    assert all(".lora_" in name for name in state["weights"])
    assert state["weights"].keys() == state["optimizer"]["state"].keys()


def test_b_learns_at_a_rate_of_its_own(job: Callable[..., Job], without_time: Any, tmp_path: Path) -> None:
    """LoRA+. The first step of the warm-up has a rate of zero; in the second A has no gradient yet, as B is zero."""
    moved: dict[float, dict[str, Tensor]] = {}
    for times in (1.0, 4.0):
        finetuning = Finetuning(job(steps=20, evaluations=1, lora_plus=times), 0, 1, Checkpoints(tmp_path / str(times)))
        finetuning.end = 2
        finetuning.run()
        moved[times] = {name: weight.detach() for name, weight in finetuning.trainable.model.named_parameters() if "lora" in name}
    for name, weight in moved[1.0].items():
        assert torch.allclose(moved[4.0][name], weight * (4 if ".lora_B." in name else 1), rtol=1e-4)
    assert any(weight.any() for name, weight in moved[1.0].items() if ".lora_B." in name)
    whole = Finetuning(job(steps=4, evaluations=2, lora_plus=4.0), 0, 1, Checkpoints(tmp_path / "whole"))
    whole.run()
    again = Finetuning(job(steps=4, evaluations=2, lora_plus=4.0), 0, 1, Checkpoints(tmp_path / "again"))
    again.restore(tmp_path / "whole" / "2")
    again.run()
    assert without_time(again.curve) == without_time(whole.curve)


@pytest.fixture
def start(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Path:
    """An adapter of another shape than the arms'."""
    return make_adapter(tmp_path / "start", tiny_base, rank=2, targets=["up_proj"], std=0.2)


def from_adapter(job: Job, start: Path, folded: bool) -> Job:
    return replace(job, arm=Arm("mashup", 1e-3, 0), start=Folder.at(start), folded=folded)


def final_nll(kept: Checkpoints) -> float:
    return float(kept.points[-1]["eval_nll"])


def test_a_folded_start_trains_a_fresh_adapter_and_leaves_the_sum_of_both(
    job: Callable[..., Job], data: Folder, start: Path, tmp_path: Path
) -> None:
    kept = Checkpoints(tmp_path / "kept")
    finetuning = Finetuning(from_adapter(job(steps=4, evaluations=2), start, folded=True), 0, 1, kept)
    finetuning.run()
    trained = {
        name.split(".lora_")[0].rpartition(".")[2] for name, w in finetuning.trainable.model.named_parameters() if w.requires_grad
    }
    assert trained == {"q_proj", "v_proj", "down_proj"}
    base = AutoModelForCausalLM.from_pretrained(job().base)
    rows = Rows(data.read_table("validation.parquet"))
    before = PeftModel.from_pretrained(base, str(start)).get_base_model()
    assert as_metrics(evaluate(scoring(before), rows))["eval_nll"] == pytest.approx(kept.points[0]["eval_nll"], abs=1e-4)
    after = evaluate_on_test(job().base, "float32", data, Folder.at(tmp_path / "kept" / "4"))
    test = Rows(data.read_table("test.parquet"))
    assert after["test_nll"] == pytest.approx(as_metrics(evaluate(finetuning.trainable.score, test))["eval_nll"], abs=1e-4)


@pytest.mark.parametrize(("settings", "folded"), [(FULL, True), (FULL, False), ({"steps": 4, "evaluations": 2}, True)])
def test_going_on_from_a_checkpoint_of_a_folded_start_or_of_all_weights(
    job: Callable[..., Job], without_time: Any, start: Path, tmp_path: Path, settings: dict[str, Any], folded: bool
) -> None:
    arm = from_adapter(job(**settings), start, folded=True) if folded else job(**settings)
    whole = Finetuning(arm, 0, 1, Checkpoints(tmp_path / "whole"))
    whole.run()
    again = Finetuning(arm, 0, 1, Checkpoints(tmp_path / "resumed"))
    again.restore(tmp_path / "whole" / "2")
    again.run()
    assert without_time(again.curve) == without_time(whole.curve)


def test_all_weights_learn_and_are_saved_as_a_model(job: Callable[..., Job], data: Folder, start: Path, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept")
    finetuning = Finetuning(from_adapter(job(**FULL), start, folded=True), 0, 1, kept)
    finetuning.run()
    assert final_nll(kept) < kept.points[0]["eval_nll"] - 0.1
    assert all(weight.requires_grad for weight in finetuning.trainable.model.parameters())
    found = evaluate_on_test(job().base, "float32", data, Folder.at(tmp_path / "kept" / "4"))
    rows = Rows(data.read_table("test.parquet"))
    assert found["test_nll"] == pytest.approx(as_metrics(evaluate(finetuning.trainable.score, rows))["eval_nll"], abs=1e-5)


def test_a_job_that_stops_early_is_the_first_part_of_the_whole(
    job: Callable[..., Job], without_time: Any, tmp_path: Path
) -> None:
    whole, part = Checkpoints(tmp_path / "whole"), Checkpoints(tmp_path / "part")
    Finetuning(job(), 0, 1, whole).run()
    Finetuning(replace(job(evaluations=1), last_step=2), 0, 1, part).run()
    assert without_time(part.points) == without_time(whole.points[:2])


def test_patience_ends_an_arm_that_no_longer_improves_but_never_the_bases(
    job: Callable[..., Job], start: Path, tmp_path: Path
) -> None:
    base = job(steps=8, evaluations=8, patience=2)
    stuck = replace(from_adapter(base, start, folded=True), arm=Arm("mashup", 1e-30, 0))
    ends = []
    for name, arm in {"stuck": stuck, "base": replace(base, arm=Arm("base", 1e-30, 0))}.items():
        finetuning = Finetuning(arm, 0, 1, Checkpoints(tmp_path / name))
        finetuning.run()
        ends.append(finetuning.curve[-1]["step"])
    assert ends == [2, 8]
    again = Finetuning(stuck, 0, 1, Checkpoints(tmp_path / "again"))
    again.restore(tmp_path / "stuck" / "2")
    again.run()
    assert again.curve[-1]["step"] == 2


class Answers:
    """Stands in for a hedge that decides at step 3: gives these answers, one after the other."""

    step = 3

    def __init__(self, *answers: bool | None):
        self.left = list(answers)

    def __call__(self) -> bool | None:
        return self.left.pop(0)


@pytest.mark.parametrize(("answers", "end"), [((None, None, True), 8), ((None, False), 3)])
def test_an_arm_waits_where_a_hedge_decides(
    job: Callable[..., Job], without_time: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: Any, end: int
) -> None:
    """It is evaluated there besides, and learns as it would without."""
    monkeypatch.setattr(loop, "ASKED_EVERY", 0.01)
    alone, held = Checkpoints(tmp_path / "alone"), Checkpoints(tmp_path / "held")
    Finetuning(job(), 0, 1, alone).run()
    wait: Any = Answers(*answers)
    finetuning = Finetuning(job(), 0, 1, held, wait=wait)
    finetuning.run()
    assert [point["step"] for point in held.points] == [step for step in (0, 2, 3, 4, 6, 8) if step <= end]
    assert wait.left == []
    assert finetuning.held > 0
    losses = {point["step"]: round(point["eval_nll"], 4) for point in alone.points}
    assert all(losses.get(point["step"]) in (None, round(point["eval_nll"], 4)) for point in held.points)


def test_an_attempt_that_begins_at_the_decision_says_where_it_stands(job: Callable[..., Job], tmp_path: Path) -> None:
    stopped: Any = Answers(False)
    Finetuning(job(), 0, 1, Checkpoints(tmp_path / "first"), wait=stopped).run()
    told: list[tuple[int, bool]] = []
    goes_on: Any = Answers(True)
    again = Finetuning(job(), 0, 1, lambda metrics, copy: told.append((metrics["step"], copy() is None)), wait=goes_on)
    again.restore(tmp_path / "first" / "3")
    again.run()
    assert told == [(3, True), (4, False), (6, False), (8, False)]  # without a checkpoint, as there is one


def test_patience_begins_after_the_decision_and_holds_for_the_base_too(job: Callable[..., Job], tmp_path: Path) -> None:
    goes_on: Any = Answers(True)
    stuck = replace(job(evaluations=8, patience=1), arm=Arm("base", 1e-30, 0))
    finetuning = Finetuning(stuck, 0, 1, Checkpoints(tmp_path), wait=goes_on)
    finetuning.run()
    assert finetuning.curve[-1]["step"] == 4


def test_divergence_ends_the_arm_and_is_told(job: Callable[..., Job], tmp_path: Path) -> None:
    finetuning = Finetuning(job(), 0, 1, Checkpoints(tmp_path))
    with torch.no_grad():
        finetuning.trainable.weights[0].fill_(math.inf)
    finetuning.run()
    assert finetuning.diverged_at == 1
    assert finetuning.curve[-1]["eval_nll"] == math.inf


def run_out_of_memory(finetuning: Finetuning, most: int, after: int = 0) -> None:
    """Let the arm's device hold passes of at most `most` padded tokens; the first `after` are let through."""
    loss, done = finetuning.trainable.loss, list[int]()

    def limited(batch: Batch) -> Tensor:
        done.append(batch.ids_BT.numel())
        if done[-1] > most and len(done) > after:
            raise torch.OutOfMemoryError
        return loss(batch)

    finetuning.trainable.loss = limited  # type: ignore[method-assign]


def test_an_arm_that_runs_out_of_memory_goes_on_in_smaller_passes(
    job: Callable[..., Job], without_time: Any, tmp_path: Path
) -> None:
    """In the second pass of a step, whose first has left gradients: they are those of the whole step all the same."""
    arm, kept = job(steps=6, evaluations=3, tokens_per_pass=64), Checkpoints(tmp_path)
    found = Finetuning(arm, 0, 1, kept)
    run_out_of_memory(found, most=33, after=6)
    found.run()
    first, *smaller = found.sizes
    assert first == 64
    assert smaller
    assert smaller == sorted(set(smaller), reverse=True)
    assert smaller[-1] <= 33
    whole = Finetuning(job(steps=6, evaluations=3, tokens_per_pass=10_000), 0, 1, lambda metrics, snapshot: None)
    whole.run()
    assert [point["eval_nll"] for point in found.curve] == pytest.approx([point["eval_nll"] for point in whole.curve], abs=1e-4)
    again = Finetuning(arm, 0, 1, lambda metrics, snapshot: None)
    again.restore(tmp_path / "4")
    assert again.sizes == found.sizes
    again.run()
    assert without_time(again.curve) == without_time(found.curve)


def test_the_gradients_of_a_step_that_is_computed_again_are_those_of_one_that_was_not(job: Callable[..., Job]) -> None:
    def trained(tokens: int, most: int) -> Finetuning:
        finetuning = Finetuning(job(steps=2, evaluations=1, tokens_per_pass=tokens), 0, 1, lambda metrics, snapshot: None)
        run_out_of_memory(finetuning, most, after=1)
        finetuning.run()
        return finetuning

    hit = trained(tokens=64, most=33)
    plain = trained(tokens=hit.sizes[-1], most=1000)
    assert hit.sizes[0] == 64
    assert len(plain.sizes) == 1
    assert hit.curve[-1]["tokens"] == plain.curve[-1]["tokens"]
    assert all(torch.equal(one, other) for one, other in zip(hit.trainable.weights, plain.trainable.weights, strict=True))


def test_a_row_that_does_not_fit_alone_is_told_with_the_way_out(job: Callable[..., Job]) -> None:
    finetuning = Finetuning(job(), 0, 1, lambda metrics, snapshot: None)
    run_out_of_memory(finetuning, most=1)
    with pytest.raises(RuntimeError, match=r"a single row does not fit .* train.gradient_checkpointing"):
        finetuning.run()


@pytest.mark.parametrize("tokens", [10_000, 40])
def test_a_step_waits_for_the_device_once_however_many_passes_it_has(
    job: Callable[..., Job], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuning = Finetuning(job(steps=2, tokens_per_pass=tokens), 0, 1, lambda metrics, snapshot: None, sizes=[tokens])
    reads, steps = HostReads(), list(finetuning.feed(finetuning.share, 0, 2))
    assert (len(steps[1]["passes"]) > 2) == (tokens == 40)

    def collated(*given: Any) -> Batch:
        reads.deaf = True  # rows are put together in the host's own memory
        batch = collate(*given)
        reads.deaf = False
        return batch

    monkeypatch.setattr("pipeline.train.loop.collate", collated)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)  # theirs, a pass
    finetuning._train_step(steps[0])
    finetuning.step = 1
    with reads:
        finetuning._train_step(steps[1])
    assert reads.found == ["tolist"]
