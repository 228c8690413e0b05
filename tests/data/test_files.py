"""Which files of a path hold a split, and in which form."""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, this_process_asks

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.data.files import form_of, source_of, split_named
from pipeline.data.readers import first_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "lines") for name in ("a.jsonl", "A.JSONL", "a.json", "a.ndjson", "a.jsonl.gz", "a.Json.GZ")),
        *((name, "csv") for name in ("a.csv", "a.CSV", "a.tsv", "a.csv.gz")),
        *((name, "parquet") for name in ("a.parquet", "A.PARQUET")),
        *((name, None) for name in ("a.txt", "README.md", "parquet", "a.gz")),
    ],
)
def test_the_form_of_a_file_is_told_by_its_suffix(name: str, form: str | None) -> None:
    assert form_of(name) == form


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("main/test-00000-of-00001.parquet", "test"),
        ("squad_dev.json", "validation"),
        ("validation/part-0.jsonl", "validation"),
        ("train/test_0.jsonl", "test"),
        ("TRAIN.jsonl", "train"),
        ("data/constraints.jsonl", None),
        ("latest.jsonl", None),
    ],
)
def test_the_split_of_a_file_is_told_by_its_name(name: str, split: str | None) -> None:
    assert split_named(name) == split


def test_a_clone_of_a_data_set_has_its_splits_by_name(folder: Path) -> None:
    put(folder, "README.md", "dataset_infos.json", ".git/train.jsonl", "data/train-0.parquet", "data/train-1.parquet")
    put(folder, "data/test-0.parquet")
    assert source_of(str(folder), "train").names == ["data/train-0.parquet", "data/train-1.parquet"]
    assert source_of(str(folder), "test").names == ["data/test-0.parquet"]
    with pytest.raises(InputError, match=r"no split 'validation' in this folder \(its files are of test, train\)"):
        source_of(str(folder), "validation")


def test_what_names_no_split_is_of_train_beside_files_that_name_another(folder: Path) -> None:
    put(folder, "rows.jsonl", "more.JSONL", "test.jsonl")
    assert source_of(str(folder), "train").names == ["more.JSONL", "rows.jsonl"]
    assert source_of(str(folder), "test").names == ["test.jsonl"]


def test_a_folder_of_files_without_names_of_splits_is_read_whole(folder: Path) -> None:
    put(folder, "a.csv", "b/c.csv.gz")
    for role in ("train", "test"):
        source = source_of(str(folder), role)
        assert (source.form, source.names) == ("csv", ["a.csv", "b/c.csv.gz"])


def test_a_json_document_beside_parquet_tells_of_it(folder: Path) -> None:
    put(folder, "about.json", "a.parquet")
    assert source_of(str(folder), "train").names == ["a.parquet"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.parquet", "b.jsonl"], "holds Parquet and 'b.jsonl', of another form"),
        (["a.csv", "b.jsonl"], "holds 'a.csv' and 'b.jsonl', of another form"),
        (["a.txt"], "must be .jsonl, .json, .csv or .parquet"),
    ],
)
def test_what_is_of_no_one_form_is_named(files: list[str], message: str, folder: Path) -> None:
    put(folder, *files)
    with pytest.raises(InputError, match=message):
        source_of(str(folder), "train")
    with pytest.raises(InputError, match=r"must be \.jsonl"):
        source_of(str(folder / "a.txt"), "train")


@pytest.fixture
def hub() -> Iterator[None]:
    """A data set of the Hub with two kinds of train and a test split."""
    rows = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), rows)
    names = ("data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet", "data/test-0.parquet")
    files = {**dict.fromkeys(names, rows.getvalue()), "README.md": b"about", "more/test.jsonl": b'{"text": "x"}\n'}
    with this_process_asks({"datasets/org/talk": files}):
        yield


@pytest.mark.usefixtures("hub")
def test_a_data_set_of_the_hub_is_read_in_place() -> None:
    where = f"hf://datasets/org/talk@{COMMIT}"
    assert source_of(f"{where}/data", "test").names == ["test-0.parquet"]
    assert source_of(f"{where}/data?split=train_sft", "train").names == ["train_sft-00000-of-00001.parquet"]
    assert list(first_rows(f"{where}/data?split=train_gen", "train")) == [b'{"prompt": "a", "completion": "b"}']
    assert list(first_rows(f"{where}/more/test.jsonl", "train")) == [b'{"text": "x"}']
    with pytest.raises(InputError, match="no file of the split 'dev'; there are test-0"):
        source_of(f"{where}/data?split=dev", "train")
    assert not Folder.at("hf://datasets/org/none").exists()
    with pytest.raises(InputError, match="can only be read"):
        Folder.at(where).create()
