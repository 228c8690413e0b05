"""Losses with the output head run where it counts, against full logits of plain transformers."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sizes import SMALL
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from pipeline.model import completion_loss
from pipeline.model.base_model import load_model
from pipeline.model.completion_loss import (
    SHARED_ON_GPU,
    Batch,
    _are_alike,
    collate,
    completion_logits,
    completion_nll,
    completion_targets,
    copied_to,
    decoder_of,
    score_rows,
    sharing_pays,
)

CPU = torch.device("cpu")


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
        monkeypatch.setattr(completion_loss, "LOGITS", chunk * vocabulary)
        model.zero_grad()
        nll_N = completion_nll(model, batch)
        nll_N.sum().backward()
        gradient = model.get_decoder().layers[0].mlp.up_proj.weight.grad.clone()
        found.append((nll_N.detach(), gradient, torch.cat([part.double() for part in score_rows(model, batch)])))
    assert len(found[0][0]) > 6
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_logits_over_layers_in_4_bits_may_round_as_their_products_do(products: torch.dtype) -> None:
    """The model's other weights are in float32."""
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=products)
    model = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(quantization_config=bits))
    logits_NV = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert _are_alike(model, logits_NV * 1.01, logits_NV) is (products == torch.bfloat16)


PREFIX = list(range(3, 28))
"""What the rows of `alike` begin with: 25 tokens."""


def alike(first_counted: int = 27) -> Batch:
    """Four rows of 27 to 39 tokens; of each, tokens count from one on."""
    generator = torch.Generator().manual_seed(0)
    ids = [PREFIX + torch.randint(28, 64, (more,), generator=generator).tolist() for more in (6, 10, 14, 2)]
    return collate(ids, [[place >= first_counted for place in range(len(row))] for row in ids], CPU)


def losses_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Losses of the tokens that count, the gradient of all weights, and the tokens in each pass through the decoder."""
    passes: list[int] = []
    count = lambda decoder, args, kwargs: passes.append(kwargs["input_ids"].numel())  # noqa: E731
    decoder = decoder_of(model)
    assert decoder is model.get_decoder()
    hook = decoder.register_forward_pre_hook(count, with_kwargs=True)
    model.zero_grad()
    nll_N = completion_nll(model, batch)
    nll_N.sum().backward()
    hook.remove()
    return nll_N.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]), passes


@pytest.fixture(params=["full attention", "sliding window", "state space"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "state space":
        return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    window = 8 if request.param == "sliding window" else 4096
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=window, query_pre_attn_scalar=16))


@pytest.mark.parametrize("training", [True, False])
def test_what_all_rows_begin_with_is_computed_once(
    model: PreTrainedModel, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train(training)
    shared = losses_and_gradients(model, alike())
    monkeypatch.setattr(completion_loss, "SHARED", 10**9)
    plain = losses_and_gradients(model, alike())
    assert plain[2] == [4 * 39]
    assert shared[2] == (plain[2] if isinstance(model, MambaForCausalLM) else [25, 4 * 14])
    torch.testing.assert_close(shared[0], plain[0])
    torch.testing.assert_close(shared[1], plain[1], rtol=1e-4, atol=1e-4 * float(plain[1].abs().max()))


def test_with_gradient_checkpointing_nothing_is_shared_in_training(tiny_base: str) -> None:
    model = load_model(tiny_base, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert losses_and_gradients(model.train(), alike())[2] == [4 * 39]
    assert losses_and_gradients(model.eval(), alike())[2] == [25, 4 * 14]


@pytest.mark.parametrize(("first_counted", "n_shared"), [(27, 25), (26, 25), (25, 24), (8, 7), (1, 0), (0, 0)])
def test_what_counts_or_predicts_it_is_not_shared(first_counted: int, n_shared: int) -> None:
    assert alike(first_counted).n_shared == n_shared


@pytest.mark.parametrize(
    ("rows", "n_shared", "on_cpu", "on_gpu"),
    [(4, 25, True, False), (2, 25, False, False), (64, SHARED_ON_GPU - 1, True, False), (2, SHARED_ON_GPU, True, True)],
)
def test_on_a_gpu_only_a_long_beginning_is_shared(rows: int, n_shared: int, on_cpu: bool, on_gpu: bool) -> None:
    found = [sharing_pays(rows, n_shared, torch.device(kind)) for kind in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]


def test_scoring_and_training_ask_whether_sharing_pays_where_they_compute(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, torch.device]] = []
    monkeypatch.setattr(completion_loss, "sharing_pays", lambda *given: bool(asked.append(given)))
    model = load_model(tiny_base, torch.float32)
    assert losses_and_gradients(model, alike())[2] == [4 * 39]
    score_rows(model, alike())
    assert asked == [(4, 25, CPU)] * 2


def test_rows_that_save_too_little_are_computed_whole(tiny_base: str) -> None:
    model, row = load_model(tiny_base, torch.float32), [*PREFIX, 30, 31]
    one, two = (collate([row] * rows, [[place > 25 for place in range(27)]] * rows, CPU) for rows in (1, 2))
    assert losses_and_gradients(model, one)[2] == [27]
    assert losses_and_gradients(model, two)[2] == [54]


class OfTheHost:
    """A tensor that notes how it is copied."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> "OfTheHost":
        self.asked.append("pinned")
        return self

    def to(self, device: torch.device, **how: bool) -> "OfTheHost":
        self.asked.append((device.type, how))
        return self


def test_copies_to_a_gpu_come_out_of_pinned_memory_and_nobody_waits_for_them() -> None:
    to_gpu, to_cpu = OfTheHost(), OfTheHost()
    copied_to(torch.device("cuda"), cast(Tensor, to_gpu))
    copied_to(torch.device("cpu"), cast(Tensor, to_cpu))
    assert to_gpu.asked == ["pinned", ("cuda", {"non_blocking": True})]
    assert to_cpu.asked == [("cpu", {})]
