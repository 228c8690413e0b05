"""Metrics of validation and test: their values, and how often the host waits for them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from host_reads import HostReads

from pipeline.core.storage import Folder
from pipeline.model.completion_loss import Batch, collate, score_tokens
from pipeline.train.arm import Job
from pipeline.train.evaluate import Rows, Score, as_metrics, evaluate
from pipeline.train.loop import Finetuning


def scoring(model: Any) -> Score:
    return partial(score_tokens, model)


def test_an_evaluation_waits_for_the_device_once(job: Callable[..., Job], data: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.evaluate.EVALUATION_TOKENS", 40)
    finetuning, rows = Finetuning(job(), 0, 1, lambda metrics, snapshot: None), Rows(data.read_table("validation.parquet"))
    reads = HostReads()

    def batch(places: Any) -> Batch:
        reads.deaf = True
        made = collate([rows.ids[p] for p in places], [rows.learn[p] for p in places], torch.device("cpu"))
        reads.deaf = False
        return made

    monkeypatch.setattr(rows, "batch", batch)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with reads:
        evaluate(finetuning.trainable.score, rows)
    assert reads.found == ["cpu"]


def test_exact_match_is_what_greedy_decoding_writes(job: Callable[..., Job], data: Folder) -> None:
    """Teacher-forced exact match equals generating greedily and comparing, row by row."""
    finetuning = Finetuning(job(steps=80, evaluations=1), 0, 1, lambda metrics, snapshot: None)
    finetuning.run()
    model, rows = finetuning.trainable.model.get_base_model(), Rows(data.read_table("train.parquet"))
    hits = []
    for ids, learn in zip(rows.ids, rows.learn, strict=True):
        prompt = ids[: learn.index(True)]
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=sum(learn), do_sample=False, eos_token_id=2, pad_token_id=0
        )[0].tolist()
        hits.append(written == ids)
    metrics = as_metrics(evaluate(scoring(model), rows))
    assert metrics["eval_exact_match"] == pytest.approx(sum(hits) / len(hits))
    assert sum(hits) > 0


def test_an_answer_matches_without_its_end_of_turn(job: Callable[..., Job], data: Folder) -> None:
    """A model that never ends a turn, and has every token of an answer as its first choice."""
    rows = Rows(data.read_table("train.parquet"))

    def score(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ends_N = torch.cat([batch.row_N[1:] != batch.row_N[:-1], torch.tensor([True])])
        return torch.ones(len(ends_N)), ~ends_N

    assert all(learn[-1] and not completion[-1] for learn, completion in zip(rows.learn, rows.completion, strict=True))
    metrics = as_metrics(evaluate(score, rows))
    assert (metrics["eval_exact_match"], metrics["eval_answer_match"], metrics["eval_token_accuracy"]) == (0, 1, 1)
