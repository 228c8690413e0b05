"""The draw from shards: the rows, splits and order of all rows in memory, sorted, whatever the number of blocks and parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from target_rows import Row, rows

from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.core.lock import LockLostError, nobody_else
from pipeline.core.parts import part_names
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES, TEST
from pipeline.data import draw, readers
from pipeline.data.files import source_of
from pipeline.data.splits import draw_samples, take_samples
from pipeline.data.tokenise import Reading, tokenise_text
from pipeline.model.base_model import load_tokenizer

pytestmark = pytest.mark.usefixtures("ray_session")

Tables = dict[str, list[Row]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few lines and parts of a few rows."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(draw, "PART_BYTES", 3000)


def plainly(config: Config, files: dict[str, list[Row]]) -> Tables:
    """All rows in memory: sorted by place, each content in one given split, the others split off from train; and the sample."""
    tokenizer = load_tokenizer(config.base)
    splits: Tables = {}
    for role in [role for role in ("test", "validation", "train") if role in files]:
        found = [tokenise_text(json.dumps(row).encode(), tokenizer, config.search.seed, Reading(1024)) for row in files[role]]
        taken = {row["sample_id"] for other in splits.values() for row in other}
        usable = [row for row in found if "problem" not in row and row["sample_id"] not in taken]
        splits[role] = sorted(usable, key=lambda row: (row["draw_key"], row["sample_id"]))
    size = max(1, int(len(splits["train"]) * 0.1))
    for role in [role for role in ("validation", "test") if role not in files]:
        splits[role] = splits["train"][:size]
        gone = {row["sample_id"] for row in splits[role]}
        splits["train"] = [row for row in splits["train"] if row["sample_id"] not in gone]
    splits["validation"] = splits["validation"][: config.target.validation_rows]
    splits["test"] = splits["test"][: config.target.test_rows]
    sample = list({row["sample_id"]: row for row in splits["train"]}.values())[: config.search.samples]
    kinds = ["search"] * (len(sample) - max(1, round(len(sample) * config.search.holdout)))
    splits["sample"] = [{**row, "split": kind} for row, kind in zip(sample, [*kinds, *["holdout"] * len(sample)], strict=False)]
    return {name: [{"split": name, **row} for row in table] for name, table in splits.items()}


def refuse() -> None:
    raise LockLostError("passed by another")


def found(tables: dict[str, pa.Table]) -> Tables:
    return {name: table.to_pylist() for name, table in tables.items()}


def without_place(tables: Tables) -> Tables:
    """Of the test split with its choices, which are none here."""
    kept = {name: TEST if name == "test" else SAMPLES for name in tables}
    return {name: [{key: row.get(key) for key in kept[name].names} for row in table] for name, table in tables.items()}


REPEATED = [*rows(60), *rows(30), *rows(8) * 5, {"prompt": "?", "completion": ""}]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "files",
    [
        {"train": REPEATED},
        {"train": REPEATED, "test": rows(20, 50)},
        {"train": REPEATED, "validation": [*rows(9, 55), *rows(5, 100)]},
        {"train": REPEATED, "validation": rows(30, 40), "test": [*rows(20, 55), *rows(20, 55)]},
    ],
    ids=["train", "with test", "with validation", "all three"],
)
def test_rows_splits_and_order_are_those_of_all_rows_in_memory(
    files: dict[str, list[Row]], tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any
) -> None:
    paths = {role: write_jsonl(tmp_path / f"{role}.jsonl", data) for role, data in files.items()}
    config = config_for(**paths, samples=30, seed=3, validation_rows=5, test_rows=9)
    drawn = draw_samples(config, Folder.at(tmp_path / "run"), nobody_else)
    tables = {role: Folder.at(tmp_path / "run/data").read_table(f"{role}.parquet") for role in drawn.sizes}
    assert len(part_names(Folder.at(tmp_path / "run/data"), "train.parquet")) > 3
    assert found({**tables, "sample": drawn.sample}) == without_place(plainly(config, files))
    assert drawn.sizes == {role: len(table) for role, table in tables.items()}
    assert drawn.counts["train"]["repeated (trained on, sampled once)"] == len(tables["train"]) - len(
        set(tables["train"]["sample_id"].to_pylist())
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


@pytest.mark.usefixtures("small")
def test_a_content_that_fills_several_parts_is_on_one_side_and_sampled_once(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any
) -> None:
    files = {"train": [*rows(60), *rows(1, 7) * 50, *rows(60, 60)]}
    config = config_for(write_jsonl(tmp_path / "t.jsonl", files["train"]), samples=8)
    splits = take_samples(config)
    assert found({**splits.training, "sample": splits.sample}) == without_place(plainly(config, files))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", ["\n", ""])
def test_every_line_of_a_file_is_read_in_one_block(end: str, tmp_path: Path, config_for: Callable[..., Config]) -> None:
    """Lines of all lengths: longer than several blocks, and ending at a block's last byte or right behind it."""
    sizes = [*range(1, 40), 5000, 3, *[999, 998, 1] * 3]
    lines = [json.dumps({"prompt": f"{n}" + " " * size, "completion": "yes"}) for n, size in enumerate(sizes)]
    (tmp_path / "t.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + end)
    assert len(readers.json_blocks(source_of(str(tmp_path / "t.jsonl"), "train"))) > 8
    counts = take_samples(config_for(tmp_path / "t.jsonl")).counts["train"]
    assert counts["repeated (trained on, sampled once)"] == 0
    assert sum(counts.values()) == len(sizes)


@pytest.mark.usefixtures("small")
def test_lines_are_counted_through_the_blocks_of_a_file(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    good = [json.dumps(row) for row in rows(100)]
    (folder := tmp_path / "d.jsonl").mkdir()
    (folder / "a.jsonl").write_text("\n".join(good))
    (folder / "b.jsonl").write_text("\n".join([*good[:41], "", "\r", '{"prompt"', *good, "[1]"]))
    with pytest.raises(InputError, match=r"d.jsonl/b.jsonl: line 44 is malformed JSON .*; each line must be one JSON object"):
        take_samples(config_for(folder))


@pytest.mark.usefixtures("small")
def test_a_row_that_fills_whole_blocks_keeps_no_later_line_from_being_named(
    tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    long = json.dumps({"prompt": "x" * 5000, "completion": "yes"})
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps(rows(1)[0]), long, '{"prompt"']))
    with pytest.raises(InputError, match="line 3 is malformed JSON"):
        take_samples(config_for(tmp_path / "t.jsonl"))


@pytest.mark.usefixtures("small")
def test_an_array_is_read_whole_and_its_entries_are_counted(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "t.json").write_text(json.dumps([*rows(100), 5]))
    assert len(readers.json_blocks(source_of(str(tmp_path / "t.json"), "train"))) == 1
    with pytest.raises(InputError, match=r"t.json: entry 101 is not a JSON object"):
        take_samples(config_for(tmp_path / "t.json"))


def test_small_files_share_a_task_and_large_ones_have_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    for name, size in {"a": 30, "b": 30, "c": 250, "d": 0, "e": 20}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    blocks = readers.json_blocks(source_of(str(tmp_path), "train"))
    assert [(block.name[0], block.start, block.stop) for block in blocks] == [
        *(("a", 0, 30), ("b", 0, 30), ("c", 0, 100), ("c", 100, 200), ("c", 200, 250), ("d", 0, 0), ("e", 0, 20))
    ]
    tasks = readers._shared_out(blocks)
    assert np.concatenate(tasks).tolist() == list(range(7))
    sizes = [sum(blocks[number].stop - blocks[number].start for number in task) for task in tasks]
    assert max(sizes) <= 200
    assert len(tasks) < len(blocks)


@pytest.mark.usefixtures("small")
def test_parts_of_an_attempt_that_was_given_up_do_not_count(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any
) -> None:
    config, folder = config_for(write_jsonl(tmp_path / "t.jsonl", rows(100))), Folder.at(tmp_path / "run")
    draw_samples(config, folder, nobody_else)
    expected = folder.read_table("data/train.parquet")
    for name in ("00000-other.parquet", "99999-other.parquet"):
        folder.write_table(f"data/train.parquet/{name}", expected)
    folder.write_bytes("tokenised/left.rows", b"x")
    draw_samples(config, folder, nobody_else)
    assert folder.read_table("data/train.parquet").equals(expected)
    assert not folder.exists("tokenised")


@pytest.mark.usefixtures("small")
def test_a_refused_target_leaves_nothing(tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any) -> None:
    with pytest.raises(InputError, match="too few to search with"):
        draw_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(3))), Folder.at(tmp_path / "run"), nobody_else)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("small")
def test_who_may_write_no_more_leaves_the_splits_and_the_shards_of_others(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any
) -> None:
    config, folder = config_for(write_jsonl(tmp_path / "t.jsonl", rows(40))), Folder.at(tmp_path / "run")
    checks = iter([None, LockLostError("passed by another")])

    def check() -> None:
        if error := next(checks):
            folder.write_bytes("data/train.parquet/00000-other.parquet", b"x")
            folder.write_bytes("tokenised/other/a.rows", b"x")
            raise error

    with pytest.raises(LockLostError):
        draw_samples(config, folder, check)
    assert folder.exists("data/train.parquet/00000-other.parquet")
    assert folder.exists("tokenised/other/a.rows")
    marker = tmp_path / "passed"

    def pass_once() -> None:
        if marker.exists():
            raise LockLostError("passed by another")
        marker.touch()

    late = Folder.at(tmp_path / "late")
    with pytest.raises(LockLostError):  # by the tasks, which are asked before each part
        draw_samples(config, late, pass_once)
    assert not late.exists("data")
    other = Folder.at(tmp_path / "other")
    with pytest.raises(LockLostError):
        draw_samples(config, other, refuse)
    assert not other.exists("data")


def test_a_run_folder_may_be_in_a_bucket(
    bucket: str, tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any
) -> None:
    config = config_for(write_jsonl(tmp_path / "t.jsonl", rows(40)))
    folder = Folder.at(f"{bucket}/run")
    drawn, expected = draw_samples(config, folder, nobody_else), take_samples(config)
    assert drawn.sample.equals(expected.sample)
    assert folder.read_table("data/train.parquet").equals(expected.training["train"])
    assert not folder.exists("tokenised")


@pytest.mark.usefixtures("small")
def test_a_saved_data_set_is_read_by_several_tasks(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list(REPEATED).save_to_disk(tmp_path / "d")
    monkeypatch.setattr("ray.data.from_huggingface", lambda rows: pytest.fail("all rows were put into the object store"))
    saved, lines = (take_samples(config_for(path)) for path in (tmp_path / "d", write_jsonl(tmp_path / "t.jsonl", REPEATED)))
    assert saved.training["train"].equals(lines.training["train"])
    assert saved.counts == lines.counts
