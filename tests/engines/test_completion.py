"""Losses with the output head run where it counts, against full logits of plain transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from pipeline.basemodel import load_model
from pipeline.engines import completion
from pipeline.engines.completion import collate, completion_logits, completion_nll, completion_targets, score_rows

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
}


def drawn_rows(n: int, vocabulary: int, seed: int = 0) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of random length and the mask of a random range of each, its end among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    ids, masks = [], []
    for _ in range(n):
        length = draw(3, 30)
        start = draw(1, length - 1)
        stop = draw(start + 1, length + 1)
        ids.append(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
        masks.append([start <= place < stop for place in range(length)])
    return ids, masks


def by_full_logits(model: Any, ids: Sequence[int], mask: Sequence[bool]) -> tuple[float, int, int]:
    """One row alone, position after position, from the model's own logits."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(dim=-1)
    counted = [place for place, inside in enumerate(mask) if inside and place > 0]
    nll = -sum(float(logp[place - 1, ids[place]]) for place in counted)
    return nll, len(counted), sum(int(logp[place - 1].argmax()) == ids[place] for place in counted)


def assert_equals_full_logits(model: Any, vocabulary: int) -> None:
    ids, masks = drawn_rows(7, vocabulary)
    found = score_rows(model, collate(ids, masks, CPU))
    for row, expected in enumerate(by_full_logits(model, i, m) for i, m in zip(ids, masks, strict=True)):
        assert float(found[0][row]) == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
        assert (int(found[1][row]), int(found[2][row])) == expected[1:]


def test_scores_equal_full_logits(tiny_base: str) -> None:
    assert_equals_full_logits(load_model(tiny_base, torch.float32), 400)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=16), Gemma2ForCausalLM),
        (CohereConfig(**SMALL, logit_scale=0.25), CohereForCausalLM),
        (GraniteConfig(**SMALL, logits_scaling=4.0), GraniteForCausalLM),
    ],
    ids=["gemma2 soft cap", "cohere logit scale", "granite logits scaling"],
)
def test_models_that_rescale_their_logits(config: Any, kind: Any) -> None:
    torch.manual_seed(0)
    assert_equals_full_logits(kind(config).eval(), SMALL["vocab_size"])


def test_the_first_token_never_counts(tiny_base: str) -> None:
    batch = collate([[5, 6, 7]], [[True, True, True]], CPU)
    nll, count, _ = score_rows(load_model(tiny_base, torch.float32), batch)
    assert count.tolist() == [2]
    assert torch.isfinite(nll).all()
    assert batch.n_tokens == 2


def test_a_row_without_a_token_that_counts_scores_nothing(tiny_base: str) -> None:
    batch = collate([[5, 6, 7], [8, 9, 10, 11]], [[False] * 3, [False, False, True, True]], CPU)
    nll, count, hits = score_rows(load_model(tiny_base, torch.float32), batch)
    assert (float(nll[0]), int(count[0]), int(hits[0])) == (0.0, 0, 0)
    assert int(count[1]) == 2


def test_targets_and_rows_follow_the_order_of_the_logits(tiny_base: str) -> None:
    batch = collate([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]], CPU)
    assert completion_targets(batch).tolist() == [6, 7, 9]
    assert batch.row_N.tolist() == [0, 0, 1]
    with torch.no_grad():
        assert completion_logits(load_model(tiny_base, torch.bfloat16), batch).dtype == torch.float32


def test_losses_and_gradients_are_the_same_in_chunks(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, masks = drawn_rows(5, 12)
    batch, model, found = collate(ids, masks, CPU), load_model(tiny_base, torch.float32), []
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for chunk in (10_000, 3):
        monkeypatch.setattr(completion, "LOGITS", chunk * vocabulary)
        model.zero_grad()
        nll_N = completion_nll(model, batch)
        nll_N.sum().backward()
        gradient = model.get_decoder().layers[0].mlp.up_proj.weight.grad.clone()
        found.append((nll_N.detach(), gradient, torch.cat([part.double() for part in score_rows(model, batch)])))
    assert len(found[0][0]) > 6
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)
