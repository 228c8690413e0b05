"""The steps of a worker from rows on its node's disk: those of the split in memory, and no more of it is read or kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core.parts import Parts, write_part
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.train import feed
from pipeline.train.arm import Job
from pipeline.train.batches import Share, make_step, row_numbers
from pipeline.train.feed import AHEAD, BATCH_ROWS, NodeRows, StepFeed, made_ahead, write_rows


def made(n_rows: int) -> pa.Table:
    rows = [
        {"sample_id": "", "split": "train", "input_ids": [n] * 3, "completion_mask": [False] * 3, "learn_mask": [True] * 3}
        for n in range(n_rows)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def in_parts(folder: Path, rows: pa.Table, size: int) -> Folder:
    data = Folder.at(folder)
    for number, start in enumerate(range(0, len(rows), size)):
        data.write_table(f"train.parquet/{number:05d}.parquet", rows.slice(start, size), row_group_rows=4)
    return data


@pytest.fixture(autouse=True)
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_the_feed_is_the_steps_in_their_order_from_any_step_on(job: Callable[..., Job], tmp_path: Path) -> None:
    rows = made(50)
    one = replace(job(steps=41, batch_size=4), data=in_parts(tmp_path / "data", rows, 15))
    share = Share(4, one.arm.seed, rank=1, workers=2, tokens=6)
    steps = StepFeed(one)
    for first, end in ((5, 41), (0, 3)):
        numbers = row_numbers(first, end, 4, len(rows), share.seed).reshape(-1, 4)
        expected = [make_step(rows.take(some), step, share) for step, some in enumerate(numbers, start=first)]
        assert list(steps(share, first, end)) == expected
    assert list(steps(share, 41, 41)) == []


def test_rows_that_fill_several_batches_are_all_found(tmp_path: Path) -> None:
    rows = made(2 * BATCH_ROWS + 100)
    data = Folder.at(tmp_path / "data")
    write_part(data, "train.parquet/00000.parquet", rows.slice(0, BATCH_ROWS + 7))
    write_part(data, "train.parquet/00001.parquet", rows.slice(BATCH_ROWS + 7))
    node = NodeRows(data, steps=3 * len(rows) // 64, batch_size=64, seed=3)
    expected = row_numbers(0, 3 * len(rows) // 64, 64, len(rows), 3).tolist()
    found = [ids[0] for step in range(3 * len(rows) // 64) for ids in node.of_step(step)["input_ids"].to_pylist()]
    assert found == expected


def test_row_groups_without_a_row_of_the_steps_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = in_parts(tmp_path / "data", made(400), 100)
    read = list[int]()
    inner = Parts._read

    def noted(self: Parts, groups: list[int], columns: list[str]) -> object:
        read.extend(groups)
        return inner(self, groups, columns)

    monkeypatch.setattr(Parts, "_read", noted)
    node = NodeRows(data, steps=2, batch_size=3, seed=0)
    wanted = row_numbers(0, 2, 3, 400, 0).tolist()
    assert read == sorted({number // 4 for number in wanted})
    assert [ids[0] for step in range(2) for ids in node.of_step(step)["input_ids"].to_pylist()] == wanted


def test_workers_of_a_node_share_the_rows_until_the_last_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, written = in_parts(tmp_path / "data", made(20), 20), list[Path]()
    monkeypatch.setattr(
        feed, "write_rows", lambda table, numbers, target: (written.append(target), write_rows(table, numbers, target))
    )
    place = tmp_path / "rows"
    one, other = (NodeRows(data, 2, 4, 0, place) for _ in range(2))
    assert len(written) == 1
    first = one.of_step(0)
    del one
    assert other.of_step(0).equals(first)
    assert len(list(place.iterdir())) == 1
    del other
    assert list(place.iterdir()) == []
    NodeRows(data, 2, 4, 1, place)
    assert len(written) == 2


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "rows"
    (place / "left").mkdir(parents=True, mode=0o700)
    place.chmod(0o700)
    rows = NodeRows(in_parts(tmp_path / "data", made(20), 20), 2, 4, 0, place)
    assert not (place / "left").exists()
    del rows


def test_few_steps_are_made_ahead() -> None:
    began = list[int]()

    def make(number: int) -> dict[str, int]:
        began.append(number)
        return {"number": number}

    steps = made_ahead(make, range(100))
    assert [next(steps)["number"] for _ in range(10)] == list(range(10))
    assert len(began) <= 10 + AHEAD
    steps.close()
    assert len(began) <= 10 + AHEAD
