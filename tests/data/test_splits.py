"""Target data -> splits: the draw, what is disjoint, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from target_rows import Row, as_messages, rows

from pipeline.config import CompareConfig, Config
from pipeline.core.errors import InputError
from pipeline.core.tables import SAMPLES, TEST
from pipeline.data import splits
from pipeline.data.splits import Splits, take_samples, target_paths
from pipeline.data.tokenise import Reading, tokenise_text
from pipeline.model.base_model import load_tokenizer


def ids_of(splits: Splits, split: str) -> list[str]:
    return splits.training[split]["sample_id"].to_pylist()


def test_many_reasons_are_told_in_few(tmp_path: Path, config_for: Callable[..., Config], ray_session: None) -> None:
    odd = [{"messages": [{"role": "user", "content": "?"}, {"role": f"r{n}", "content": "x"}]} for n in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows(30), *odd])))
    counts = take_samples(config_for(tmp_path / "t.jsonl")).counts["train"]
    assert counts["used"] == 30
    assert counts["other reasons"] == 300 - splits.MAX_PROBLEMS


def shown(splits: Splits) -> list[Row]:
    """Everything that a run draws from."""
    return [splits.sample.to_pylist(), *(splits.training[role].to_pylist() for role in ("train", "validation", "test"))]


def write_as(kind: str, folder: Path, data: list[Row]) -> Path:
    """`data` in one of the file formats that a target may have."""
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(data), folder / "train.parquet", row_group_size=7)
        return folder / "train.parquet"
    if kind == "parquet folder":
        for number in range(3):
            pq.write_table(pa.Table.from_pylist(data[number::3]), folder / f"{number}.parquet")
        return folder
    if kind == "Dataset":
        Dataset.from_list(data).save_to_disk(folder / "d")
        return folder / "d"
    if kind == "DatasetDict":
        DatasetDict({"train": Dataset.from_list(data), "other": Dataset.from_list(rows(2))}).save_to_disk(folder / "d")
        return folder / "d"
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    return folder / "train.jsonl"


@pytest.mark.usefixtures("ray_session")
def test_the_draw_depends_on_content_and_seed_alone(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    data = rows(40)
    expected = shown(take_samples(config_for(write_as("jsonl", tmp_path / "a", data))))
    messages = [as_messages(row) for row in data]
    others = {
        "jsonl": data[::-1],
        "parquet": messages,
        "parquet folder": data,
        "Dataset": data[20:] + data[:20],
        "DatasetDict": messages,
    }
    for kind, content in others.items():
        found = take_samples(config_for(write_as(kind, tmp_path / kind.replace(" ", "-"), content)))
        assert shown(found) == expected, kind
    other_seed = take_samples(config_for(tmp_path / "a" / "train.jsonl", seed=1))
    assert shown(other_seed) != expected


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet folder", "Dataset"])
def test_the_sample_may_be_the_first_rows_of_train(kind: str, tmp_path: Path, config_for: Callable[..., Config]) -> None:
    """Those that no other split has, each content once."""
    data = rows(250)
    in_files = [row for number in range(3) for row in data[number::3]] if kind == "parquet folder" else data
    path = write_as(kind, tmp_path / "t", [data[0], *data] if kind == "jsonl" else data)
    found, every = (take_samples(in_order(config_for(path, samples=count))) for count in (150, 250))
    order = every.sample["sample_id"].to_pylist()
    assert found.sample["sample_id"].to_pylist() == order[:150]
    assert set(order) == set(ids_of(found, "train"))
    texts = [str(row["input_ids"]) for row in every.sample.to_pylist()]
    alone = [str(row["input_ids"]) for row in tokens_of(in_files, config_for(path))]
    assert texts == [text for text in alone if text in set(texts)]
    assert found.sample["split"].to_pylist() == ["search"] * 112 + ["holdout"] * 38


def in_order(config: Config) -> Config:
    return config.model_copy(update={"search": config.search.model_copy(update={"draw": "first"})})


def tokens_of(data: list[Row], config: Config) -> list[Row]:
    """Rows in their order, tokenised one by one."""
    tokenizer = load_tokenizer(config.base)
    return [tokenise_text(json.dumps(row).encode(), tokenizer, 0, Reading()) for row in data]


@pytest.mark.usefixtures("ray_session")
def test_splits_are_disjoint_and_complete(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(40)), samples=8))
    train, validation, test = (ids_of(splits, role) for role in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (32, 4, 4)
    assert len({*train, *validation, *test}) == 40
    drawn = splits.sample["sample_id"].to_pylist()
    assert set(drawn) <= set(train)
    assert splits.sample["split"].to_pylist() == ["search"] * 6 + ["holdout"] * 2
    assert len(set(drawn)) == 8
    columns = {name: table.schema.names for name, table in {"sample": splits.sample, **splits.training}.items()}
    assert columns == {**dict.fromkeys(("sample", "train", "validation"), SAMPLES.names), "test": TEST.names}
    assert splits.training["test"]["choices"].null_count == 4
    assert {role: set(table["split"].to_pylist()) for role, table in splits.training.items()} == {
        "train": {"train"},
        "validation": {"validation"},
        "test": {"test"},
    }


@pytest.mark.usefixtures("ray_session")
def test_given_splits_are_read_and_limited(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    paths = {
        role: write_jsonl(tmp_path / f"{role}.jsonl", rows(10, start)) for role, start in [("validation", 100), ("test", 200)]
    }
    train = write_jsonl(tmp_path / "train.jsonl", rows(20))
    splits = take_samples(config_for(train, validation_rows=3, test_rows=4, **paths))
    assert {role: len(table) for role, table in splits.training.items()} == {"train": 20, "validation": 3, "test": 4}
    assert splits.counts == {
        "train": {"used": 20, "repeated (trained on, sampled once)": 0},
        "validation": {"used": 10},
        "test": {"used": 10},
    }


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("given", [False, True], ids=["split off", "given"])
def test_choices_are_kept_of_the_test_split(
    given: bool, tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    """Of a test split that is given its own rows alone need any."""
    options = [{**row, "options": [row["completion"], "It is 5."]} for row in rows(20, 100)]
    paths = {"test": write_jsonl(tmp_path / "test.jsonl", options)} if given else {}
    train = write_jsonl(tmp_path / "train.jsonl", rows(20) if given else options)
    config = config_for(train, columns={"choices": "options"}, **paths)
    asked = config.model_copy(update={"compare": CompareConfig(metric="choices")})
    splits, without = take_samples(asked), take_samples(config)
    test = splits.training["test"].to_pylist()
    assert len(test) == (20 if given else 2)
    assert all([choice["input_ids"] == row["input_ids"] for choice in row["choices"]] == [True, False] for row in test)
    assert splits.counts["train"].keys() == {"used", "repeated (trained on, sampled once)"}
    assert {role: ids_of(splits, role) for role in ("train", "validation", "test")} == {
        role: ids_of(without, role) for role in ("train", "validation", "test")
    }


@pytest.mark.usefixtures("ray_session")
def test_repeated_rows_are_sampled_once_and_stay_on_one_side_of_a_split(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    data = [row for row in rows(12) for _ in range(5)]
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", data), samples=64))
    drawn = splits.sample["sample_id"].to_pylist()
    train, validation, test = (set(ids_of(splits, role)) for role in ("train", "validation", "test"))
    assert sorted(drawn) == sorted(train)
    assert splits.counts["train"]["repeated (trained on, sampled once)"] == len(ids_of(splits, "train")) - len(train)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.usefixtures("ray_session")
def test_rows_passed_over_are_counted(tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]) -> None:
    bad = [{"prompt": "x", "completion": "word " * 200}, {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": " "}]
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", bad + rows(20)), max_tokens=64))
    assert splits.counts["train"] == {
        "used": 20,
        "longer than 64 tokens": 1,
        "empty completion": 2,
        "repeated (trained on, sampled once)": 0,
    }


@pytest.mark.usefixtures("ray_session")
def test_rows_that_the_base_cannot_read_at_once_are_passed_over(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    """The tiny base reads 512 tokens."""
    path = write_jsonl(tmp_path / "t.jsonl", [*rows(20), {"prompt": "fox " * 600, "completion": "x"}])
    assert take_samples(config_for(path)).counts["train"]["longer than 511 tokens"] == 1


@pytest.mark.usefixtures("ray_session")
def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    data = [{"prompt": f"a\u2028b {i}", "completion": "c\x85d\u2029e"} for i in range(20)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in data), encoding="utf-8")
    assert take_samples(config_for(path)).counts["train"]["used"] == 20


def shared(folder: Path, sizes: dict[str, range]) -> dict[str, str]:
    """A file for each split of a target, with those of all the rows there are."""
    for role, places in sizes.items():
        (folder / f"{role}.jsonl").write_text("\n".join(json.dumps(row) for place in places for row in rows(1, place)))
    return {role: str(folder / f"{role}.jsonl") for role in sizes}


@pytest.mark.usefixtures("ray_session")
def test_what_is_in_several_given_splits_stays_in_one(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    sizes = {"train": range(40), "validation": range(36, 50), "test": range(30, 38)}
    splits = take_samples(config_for(**shared(tmp_path, sizes)))
    train, validation, test = (set(ids_of(splits, role)) for role in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (30, 12, 8)
    assert len(train | validation | test) == 50
    assert splits.counts == {
        "train": {"used": 30, "also in test or validation": 10, "repeated (trained on, sampled once)": 0},
        "validation": {"used": 12, "also in test": 2},
        "test": {"used": 8},
    }
    (tmp_path / "other").mkdir()
    other_order = take_samples(config_for(**shared(tmp_path / "other", {role: places[::-1] for role, places in sizes.items()})))
    assert shown(other_order) == shown(splits)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": range(20), "test": range(20)[::-1]}, "train.jsonl: 20 of 20 usable .* in .*/test.jsonl .target.test.; give"),
        (
            {"train": range(20), "validation": range(9, 40)},
            "11 of 20 .*target.train. .*/validation.jsonl .target.validation.; give",
        ),
        (
            {"train": range(20), "validation": range(30, 34), "test": range(30, 40)},
            "/validation.jsonl: 4 of 4 .*/test.jsonl .target.test.; give each split rows of its own",
        ),
    ],
)
def test_splits_of_hardly_any_rows_of_their_own_are_refused(
    sizes: dict[str, range], message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    with pytest.raises(InputError, match=message):
        take_samples(config_for(**shared(tmp_path, sizes)))


@pytest.mark.usefixtures("ray_session")
def test_splits_of_one_folder_that_hold_the_same_rows_are_refused(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    path = str(tmp_path / "d")
    DatasetDict({role: Dataset.from_list(rows(20)) for role in ("train", "test")}).save_to_disk(path)
    with pytest.raises(InputError, match="20 of 20 usable rows"):
        take_samples(config_for(path, test=path))


def fault(kind: str, folder: Path) -> str:
    """A target with something wrong; its path."""
    path = folder / "t.jsonl"
    good = [json.dumps(row) for row in rows(20)]
    texts = {
        "malformed line": "\n".join([*good[:3], '{"prompt": ', *good[3:]]),
        "list for an object": "\n".join([*good, "[1, 2]"]),
        "endless nesting": "\n".join([*good, "[" * 100_000]),
        "empty": "",
        "only blank lines": "\n\n\n",
        "unusable": '{"label": "a"}\n{"prompt": "a", "completion": ""}\n',
        "too few to split": "\n".join(good[:2]),
        "too few to search": "\n".join(good[:3]),
    }
    if kind in texts:
        path.write_text(texts[kind], encoding="utf-8")
    elif kind == "UTF-16":
        path.write_text("\n".join(good), encoding="utf-16")
    elif kind == "folder with a malformed line":
        (path := folder / "d.jsonl").mkdir()
        for name, lines in (("_skipped", "{"), ("a.jsonl", good[0]), ("b.jsonl", "\n{")):
            (path / name).write_text(lines)
    elif kind == "one row many times":
        path.write_text("\n".join(good[:1] * 50))
    elif kind == "other encoding":
        path.write_bytes('{"prompt": "café", "completion": "x"}\n'.encode("latin-1") * 3)
    elif kind == "not a Parquet file":
        (path := folder / "t.parquet").write_text("no Parquet at all")
    elif kind == "empty Parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path := folder / "t.parquet")
    elif kind == "a name that is too long":
        path = folder / ("x" * 300 + ".jsonl")
    elif kind == "other suffix":
        (path := folder / "t.xlsx").write_text("prompt,completion\na,b\n")
    elif kind == "empty folder":
        (path := folder / "empty").mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder of datasets without its data":
        Dataset.from_list(rows(5)).save_to_disk(path := folder / "d")
        next(path.glob("*.arrow")).write_bytes(b"x")
    elif kind == "split that is not there":
        DatasetDict({"other": Dataset.from_list(rows(5))}).save_to_disk(path := folder / "d")
    else:
        path = folder / "missing.jsonl"
    return str(path)


def test_the_same_data_is_not_taken_for_two_splits(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", rows(20))
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(InputError, match="the same data for two splits"):
        target_paths(config_for(path, test=str(tmp_path / "link.jsonl")))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("malformed line", "t.jsonl: line 4 is malformed JSON"),
        ("list for an object", "t.jsonl: line 21 is not a JSON object"),
        ("empty", "t.jsonl: the data set is empty"),
        ("only blank lines", "t.jsonl: the data set is empty"),
        ("unusable", "t.jsonl: no row can be used .*1 x of no known form: it has label"),
        ("too few to split", "too few to split"),
        ("too few to search", "too few to search with"),
        ("other encoding", "t.jsonl: line 1 is malformed JSON"),
        ("UTF-16", "t.jsonl: line 1 holds zero bytes, as UTF-16 does; .* in UTF-8"),
        ("folder with a malformed line", "d.jsonl/b.jsonl: line 2 is malformed JSON"),
        ("one row many times", "1 distinct usable rows are too few to split"),
        ("not a Parquet file", "t.parquet"),
        ("empty Parquet", "t.parquet: the data set is empty"),
        ("other suffix", "t.xlsx: target.train must be"),
        ("empty folder", "empty: the data set is empty, or no file"),
        ("endless nesting", "t.jsonl: line 21 is malformed JSON"),
        ("named pipe", "t.jsonl: the data set is empty, or no file"),
        ("folder of datasets without its data", "d: target.train is no folder that `datasets` saved whole"),
        ("split that is not there", "no split 'train'"),
        ("a name that is too long", "cannot be looked at .target.train; .*File name too long"),
        ("missing", "missing.jsonl: no such file or folder .target.train"),
    ],
)
def test_a_target_that_cannot_be_used_is_an_input_error(
    kind: str, message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    with pytest.raises(InputError, match=message):
        take_samples(config_for(fault(kind, tmp_path)))


@pytest.mark.usefixtures("ray_session")
def test_an_unknown_base_is_an_input_error(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(InputError, match="no such folder"):
        take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(20)), base="/no/such/base"))
