"""How large a training pass is, on a GPU that is a table of numbers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.core.errors import PassTooLargeError
from pipeline.core.storage import Folder
from pipeline.model.completion_loss import Batch
from pipeline.train.arm import Job
from pipeline.train.evaluate import Rows
from pipeline.train.passes import LEAST, MEASURED, MOST, SHARE, choose_tokens

GB, MB = 1_000_000_000, 1_000_000


class Card:
    """A GPU with a model on it, in bytes: what a pass takes a token, and what the first one leaves behind."""

    def __init__(self, memory: int, weights: int, a_token: int, gradients: int = 0):
        self.memory, self.held, self.a_token, self.gradients = memory, weights, a_token, gradients
        self.peak, self.measured = weights, list[int]()
        self.weights = [torch.nn.Parameter(torch.zeros(3))]

    def loss(self, batch: Batch) -> Any:
        n_tokens = batch.ids_BT.numel()
        assert batch.n_tokens == n_tokens - len(batch.ids_BT)  # all that can be learned is: no row has less logits
        assert batch.n_shared == 0
        return SimpleNamespace(backward=lambda: self.compute(n_tokens))

    def compute(self, n_tokens: int) -> None:
        self.measured.append(n_tokens)
        self.held, self.gradients = self.held + self.gradients, 0
        self.peak = self.held + n_tokens * self.a_token
        self.weights[0].grad = torch.ones(3)
        if self.peak > self.memory:
            raise torch.OutOfMemoryError

    def moment_bytes(self) -> int:
        return 1 * GB

    def reset(self) -> None:
        self.peak = self.held


@pytest.fixture
def choose(job: Callable[..., Job], data: Folder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """choose(card, **train): what is chosen on it."""

    def chosen(card: Card, **train: Any) -> int:
        monkeypatch.setattr("pipeline.train.passes.device", lambda: torch.device("cuda"))
        given = {
            "memory_allocated": lambda: card.held,
            "max_memory_allocated": lambda: card.peak,
            "reset_peak_memory_stats": card.reset,
            "memory_reserved": lambda: card.held + 2 * GB,
            "mem_get_info": lambda: (card.memory - card.held - 2 * GB, card.memory),
        }
        for name, function in given.items():
            monkeypatch.setattr(torch.cuda, name, function)
        trainable: Any = card
        return choose_tokens(job(**train), trainable, Rows(data.read_table("validation.parquet")))

    return chosen


def test_a_pass_fits_into_what_weights_gradients_and_moments_leave(choose: Callable[..., int]) -> None:
    card = Card(48 * GB, weights=16 * GB, a_token=6 * MB, gradients=GB // 2)
    found = choose(card)
    assert found == int(SHARE * (48 - 16 - 0.5 - 1) * GB / (6 * MB))
    assert 2 * LEAST < found < 8192
    assert len(card.measured) == 2
    assert MEASURED // 2 < card.measured[0] <= MEASURED
    assert card.weights[0].grad is None


def test_a_small_model_gets_no_larger_passes_than_are_of_use(choose: Callable[..., int]) -> None:
    assert choose(Card(80 * GB, weights=GB, a_token=MB // 10)) == MOST


def test_where_the_small_pass_does_not_fit_rows_are_computed_almost_alone(choose: Callable[..., int]) -> None:
    card = Card(20 * GB, weights=18 * GB, a_token=20 * MB)
    assert choose(card) == LEAST
    assert card.weights[0].grad is None


def test_where_others_wait_for_this_workers_part_all_start_anew(choose: Callable[..., int]) -> None:
    with pytest.raises(PassTooLargeError) as raised:
        choose(Card(20 * GB, weights=18 * GB, a_token=20 * MB), shard=True)
    assert raised.value.sizes == [LEAST]


def test_what_the_config_asks_for_is_not_measured(choose: Callable[..., int]) -> None:
    card = Card(48 * GB, weights=16 * GB, a_token=6 * MB)
    assert choose(card, tokens_per_pass=777) == 777
    assert card.measured == []
