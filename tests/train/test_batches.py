"""Which rows a step takes, and how workers share them out."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.tables import SAMPLES
from pipeline.model.length_batches import length_batches
from pipeline.train.batches import STEP, Share, halved, make_step, padded_tokens, row_numbers, share_out

LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Thirteen rows of uneven length; the ids of each tell which it is."""
    lengths = np.random.default_rng(0).integers(3, 40, 13).tolist()
    return pa.Table.from_pylist(
        [
            {
                "sample_id": str(row),
                "split": "train",
                "input_ids": [row] * length,
                "completion_mask": [False] * length,
                "learn_mask": [False] * (length - 2) + [True] * 2,
            }
            for row, length in enumerate(lengths)
        ],
        schema=SAMPLES,
    )


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    numbers = row_numbers(0, 6, batch_size=5, n_rows=10, seed=3).tolist()
    epochs = [numbers[:10], numbers[10:20], numbers[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != row_numbers(0, 2, 5, 10, seed=4).tolist()


@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 9), first=st.integers(0, 20), count=st.integers(0, 20))
def test_rows_are_those_of_the_epochs_permutations(n_rows: int, batch_size: int, first: int, count: int) -> None:
    epochs = -(-batch_size * (first + count) // n_rows)
    order = [row for epoch in range(epochs) for row in np.random.default_rng([5, epoch]).permutation(n_rows).tolist()]
    expected = order[batch_size * first : batch_size * (first + count)]
    assert row_numbers(first, first + count, batch_size, n_rows, seed=5).tolist() == expected


@given(lengths=LENGTHS, workers=st.integers(1, 5), tokens=st.integers(1, 200))
def test_workers_share_all_rows_in_equally_many_passes(lengths: list[int], workers: int, tokens: int) -> None:
    shares = share_out(lengths, workers, tokens)
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert padded_tokens(lengths, workers, tokens) >= sum(lengths)
    assert padded_tokens(lengths, workers, tokens=1) == sum(lengths)


@given(lengths=LENGTHS, tokens=st.integers(1, 200))
def test_halved_passes_make_the_largest_smaller_unless_each_has_one_row(lengths: list[int], tokens: int) -> None:
    def sizes(tokens: int) -> list[int]:
        return [len(batch) * lengths[batch[0]] for batch in length_batches(lengths, tokens) if len(batch) > 1]

    passes = [[{"ids": [0] * lengths[p]} for p in batch] for batch in length_batches(lengths, tokens)]
    smaller = halved(passes)
    assert bool(smaller) == bool(sizes(tokens))
    if smaller:
        assert smaller < tokens
        assert max(sizes(smaller), default=0) <= max(sizes(tokens)) / 2


@pytest.mark.parametrize(("workers", "tokens"), [(1, 1000), (3, 40), (6, 40)])
def test_the_workers_steps_are_the_global_batch(rows: pa.Table, workers: int, tokens: int) -> None:
    shares = [Share(5, seed=1, rank=rank, workers=workers, tokens=tokens) for rank in range(workers)]
    for number in range(6):
        numbers = row_numbers(number, number + 1, 5, len(rows), seed=1)
        steps = [make_step(rows.take(numbers), number, share) for share in shares]
        given = [row for step in steps for batch in step["passes"] for row in batch]
        learned = [row["ids"][0] for row in given if any(row["learn"])]
        assert sorted(learned) == sorted(numbers.tolist())
        assert {step["n_learned"] for step in steps} == {10}
        assert {step["number"] for step in steps} == {number}
        assert pa.Table.from_pylist(steps, schema=STEP).to_pylist() == steps


def test_going_on_in_the_middle_of_an_epoch_misses_and_repeats_nothing(rows: pa.Table) -> None:
    whole = row_numbers(0, 13, 4, len(rows), seed=0).tolist()
    assert [*row_numbers(0, 5, 4, len(rows), seed=0), *row_numbers(5, 13, 4, len(rows), seed=0)] == whole
    assert sorted(whole) == sorted(list(range(13)) * 4)
