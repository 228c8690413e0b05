"""Rows of like length in batches."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.length_batches import length_batches

LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=30)


@given(lengths=LENGTHS, tokens=st.integers(1, 200))
def test_length_batches_hold_every_row_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    batches = length_batches(lengths, tokens)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= tokens for batch in batches)
    assert length_batches([], tokens) == []
