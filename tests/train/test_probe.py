"""Losses after a few steps from each start: each computed once, on rows that the steps do not see."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core.storage import Folder
from pipeline.train.arm import Job
from pipeline.train.loop import Finetuning
from pipeline.train.probe import probe, write_probe_data


def test_held_out_rows_are_not_trained_on(tmp_path: Path, data: Folder) -> None:
    train = data.read_table("train.parquet")
    write_probe_data(data, train.slice(3, 5), Folder.at(tmp_path))
    kept = Folder.at(tmp_path).read_table("train.parquet")["sample_id"].to_pylist()
    assert kept == [name for place, name in enumerate(train["sample_id"].to_pylist()) if not 3 <= place < 8]
    assert Folder.at(tmp_path).read_table("validation.parquet").equals(train.slice(3, 5))


def test_a_split_in_parts_is_gone_through_part_by_part(tmp_path: Path, data: Folder) -> None:
    train, parted, target = data.read_table("train.parquet"), Folder.at(tmp_path / "parts"), Folder.at(tmp_path / "probe")
    for number, start in enumerate(range(0, len(train), 20)):
        parted.write_table(f"train.parquet/{number}.parquet", train.slice(start, 20))
    write_probe_data(parted, train.slice(15, 10), target)
    assert target.read_table("train.parquet").equals(pa.concat_tables([train.slice(0, 15), train.slice(25)]))


def test_what_an_earlier_attempt_left_does_not_count(tmp_path: Path, data: Folder) -> None:
    train, target = data.read_table("train.parquet"), Folder.at(tmp_path)
    target.write_table("train.parquet", train)  # as older versions did, one file
    for _ in range(2):
        write_probe_data(data, train.slice(0, 5), target)
        assert target.read_table("train.parquet").equals(train.slice(5))
        target.write_table("train.parquet/99999.parquet", train)


@pytest.mark.usefixtures("ray_session")
def test_a_probe_is_a_short_finetuning_and_is_made_once(tmp_path: Path, job: Callable[..., Job]) -> None:
    results = Folder.at(tmp_path)
    results.write_json("known.json", {"nll": 1.25})
    said: list[str] = []
    short = job(steps=3, evaluations=1)
    found = probe({"known": short, "fresh": short}, results, said.append)
    here = Finetuning(short, 0, 1, lambda metrics, snapshot: None)
    here.run()
    assert found == {"known": 1.25, "fresh": pytest.approx(here.curve[-1]["eval_nll"], abs=1e-4)}
    assert results.read_json("fresh.json") == {"nll": found["fresh"]}
    assert len(said) == 1
