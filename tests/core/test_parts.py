"""A table in parts: its rows by their numbers, and no row group is read that holds none of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.ledger import Ledger, Outputs
from pipeline.core.parts import ROW_GROUP_BYTES, Parts, part_names, write_part
from pipeline.core.storage import Folder

TABLE = pa.table({"n": range(100), "text": [f"row {n}" for n in range(100)]})


@pytest.fixture(params=["parts", "one file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    folder = Folder.at(tmp_path)
    if request.param == "one file":
        folder.write_table("t.parquet", TABLE, row_group_rows=9)
        return folder
    for number, (start, stop) in enumerate([(0, 40), (40, 40), (40, 100)]):
        folder.write_table(f"t.parquet/{number:05d}.parquet", TABLE.slice(start, stop - start), row_group_rows=9)
    return folder


def test_all_rows_come_in_order_a_row_group_at_a_time(folder: Folder) -> None:
    table = Parts(folder, "t.parquet")
    batches = list(table.batches(["n"]))
    assert len(table) == 100
    assert pa.concat_tables(batches)["n"].to_pylist() == list(range(100))
    assert max(map(len, batches)) == 9
    assert folder.read_table("t.parquet").equals(TABLE)


@pytest.mark.parametrize("numbers", [[0], [99], [0, 8, 9, 39, 40, 41, 99], list(range(100)), []])
def test_rows_are_taken_by_their_numbers(folder: Folder, numbers: list[int]) -> None:
    found = [row for part in Parts(folder, "t.parquet").take(np.array(numbers, dtype=int), ["text"]) for row in part.to_pylist()]
    assert found == [{"text": f"row {number}"} for number in numbers]


def test_row_groups_are_small_however_long_the_rows(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for name, length in (("long", 100_000), ("longest", ROW_GROUP_BYTES)):
        write_part(
            folder, f"{name}.parquet", pa.table({"ids": [list(range(length))] * 6}, pa.schema([("ids", pa.list_(pa.int32()))]))
        )
    sizes = {name: pq.read_metadata(tmp_path / f"{name}.parquet") for name in ("long", "longest")}
    rows = {name: [found.row_group(group).num_rows for group in range(found.num_row_groups)] for name, found in sizes.items()}
    assert rows == {"long": [2, 2, 2], "longest": [1] * 6}
    write_part(folder, "empty.parquet", TABLE.slice(0, 0))
    assert len(Parts(folder, "empty.parquet")) == 0


@pytest.mark.parametrize("gone", [False, True])
def test_a_stage_one_of_whose_parts_is_cut_short_or_gone_is_not_done(gone: bool, tmp_path: Path) -> None:
    folder, stages = Folder.at(tmp_path), {"samples": Outputs(["data"])}
    with Ledger(folder, stages).perform("samples", "a"):
        for number in range(3):
            write_part(folder, f"data/train.parquet/{number}.parquet", TABLE)
    assert Ledger(folder, stages).done("samples", "a")
    part = tmp_path / part_names(folder, "data/train.parquet")[1]
    content = part.read_bytes()
    part.unlink()
    if not gone:
        part.write_bytes(content[:-5])
    assert not Ledger(folder, stages).done("samples", "a")
