"""Schemas at the boundary between stages."""

import pyarrow as pa
import pytest

from pipeline.core.tables import LEADERBOARD, SCORES, SCORING_FAILURES, require


def test_columns_come_in_the_order_and_types_of_the_schema() -> None:
    table = pa.table({"reason": ["x"], "more": [1], "adapter_id": pa.array(["a"], pa.large_string())})
    found = require(table, SCORING_FAILURES, "failures")
    assert found.schema == SCORING_FAILURES
    assert found.to_pylist() == [{"adapter_id": "a", "reason": "x"}]


def test_a_missing_column_is_named_with_the_table_and_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"scores: column 'nll_sum' is missing; it has adapter_id, sample_id"):
        require(pa.table({"adapter_id": ["a"], "sample_id": ["s"]}), SCORES, "scores")


def test_a_column_of_another_type_is_refused() -> None:
    table = SCORING_FAILURES.empty_table().set_column(0, "adapter_id", pa.array([], pa.list_(pa.int32())))
    with pytest.raises(pa.ArrowException):
        require(table, SCORING_FAILURES, "failures")


def test_an_empty_leaderboard_is_still_one() -> None:
    assert require(LEADERBOARD.empty_table(), LEADERBOARD, "leaderboard").num_rows == 0
