"""Shards: rows in the order of their draw keys, read back by ranges of keys, and the counts that the draw is made of."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.storage import Folder
from pipeline.data.shards import HASHES, LEAST, OTHER_REASONS, RANGES, ROWS, Lines, read_pieces, shortened, write_shard
from pipeline.data.tokenise import TOKENISED


def tokenised(keys: list[int], problems: int = 0) -> pa.Table:
    """A row of each draw key, and some that cannot be used."""
    good = [
        {"role": "train", "draw_key": key, "sample_id": f"{key:032x}", "input_ids": [n, n + 1], "learn_mask": [False, True]}
        for n, key in enumerate(keys)
    ]
    bad = [{"role": "train", "problem": "malformed"}] * problems
    return pa.Table.from_pylist([{**row, "completion_mask": row.get("learn_mask")} for row in [*good, *bad]], schema=TOKENISED)


@pytest.fixture
def keys() -> list[int]:
    """Of all sizes, the least of a range and the one before it among them."""
    drawn = np.random.default_rng(0).integers(0, 1 << 63, 300, dtype=np.uint64).astype(object) * 2
    return [0, int(LEAST[1]), int(LEAST[1]) - 1, (1 << 64) - 1, *map(int, drawn)]


def test_the_rows_of_all_shards_come_back_by_ranges_and_in_order(keys: list[int], tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    shards = pa.concat_tables([write_shard(folder, "train", tokenised(keys[start::2]), Lines({}, [])) for start in (0, 1)])
    assert read_pieces(folder, shards, "rows", 0, RANGES)["draw_key"].to_pylist() == sorted(keys)
    width = RANGES // 4
    parts = [read_pieces(folder, shards, "hashes", start, start + width) for start in range(0, RANGES, width)]
    assert [key for part in parts for key in part["draw_key"].to_pylist()] == sorted(keys)
    assert parts[0].schema.names == HASHES.names
    first = read_pieces(folder, shards, "rows", 0, 1)
    assert first.schema.names == ROWS.names
    assert set(first["draw_key"].to_pylist()) == {key for key in keys if key < int(LEAST[1])}


def test_a_report_counts_rows_by_range_and_by_what_is_wrong_with_them(keys: list[int], tmp_path: Path) -> None:
    (report,) = write_shard(Folder.at(tmp_path), "test", tokenised(keys, problems=3), Lines({4: 310}, [4])).to_pylist()
    assert (report["role"], sum(report["counts"]), len(report["counts"])) == ("test", len(keys), RANGES)
    assert dict(report["problems"]) == {"used": len(keys), "malformed": 3}
    assert (dict(report["lines"]), report["malformed"]) == ({4: 310}, [4])


def test_a_shard_without_a_row_that_can_be_used_has_none(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    shards = write_shard(folder, "train", tokenised([], problems=2), Lines({}, []))
    assert len(read_pieces(folder, shards, "rows", 0, RANGES)) == 0


def test_of_many_reasons_the_commonest_are_told_and_the_others_counted() -> None:
    found = Counter({"a": 5, "b": 3, "c": 1, OTHER_REASONS: 2})
    assert shortened(found, 2) == {"a": 5, "b": 3, OTHER_REASONS: 3}
    assert shortened(Counter({"a": 1}), 2) == {"a": 1}
