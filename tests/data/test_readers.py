"""Target data of any form: what is read of it, and what of harmed files is refused in words."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.data import readers
from pipeline.data.readers import first_rows, unreadable
from pipeline.data.splits import take_samples

ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": f"The sum is {2 * n}."} for n in range(40)]


@pytest.mark.usefixtures("ray_session")
def test_text_that_a_table_holds_as_bytes_is_text(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    columns = {name: [row[name].encode() for row in ROWS] for name in ("prompt", "completion")}
    others = {"image": pa.array([b"\xff"] * 40), "price": [Decimal(1)] * 40, "role": [None] * 40}
    for name, kind in (("text", pa.string()), ("bytes", pa.binary())):
        table = pa.table({key: pa.array(values, kind) for key, values in columns.items()} | others)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found, expected = (take_samples(config_for(tmp_path / f"{name}.parquet")) for name in ("bytes", "text"))
    assert found.training["train"].equals(expected.training["train"])


@pytest.mark.usefixtures("ray_session")
def test_a_file_may_be_one_array(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "array.json").write_text("\ufeff\n" + json.dumps(ROWS, indent=2))
    found, expected = (take_samples(config_for(tmp_path / name)) for name in ("array.json", "lines.jsonl"))
    assert found.training["train"].equals(expected.training["train"])


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([*ROWS, "a row"]), "entry 41 is not a JSON object"),
        (json.dumps(ROWS)[:-1], "line 1 is malformed JSON"),
        ("[" * 100_000, "line 1 is malformed JSON"),
    ],
    ids=["a text for a row", "cut short", "endless nesting"],
)
def test_of_an_array_the_bad_entry_is_named(
    content: str, message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    (tmp_path / "array.json").write_text(content)
    with pytest.raises(InputError, match=f"array.json: {message}"):
        take_samples(config_for(tmp_path / "array.json"))


@pytest.mark.usefixtures("ray_session")
def test_what_a_folder_of_parquet_is_called_is_no_column(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "prompt=zzz").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "prompt=zzz" / "t.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "t.parquet")
    assert take_samples(config_for(tmp_path)).counts["train"]["used"] == len(ROWS) + 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": b"{}", "b.parquet": b"PAR1"}, "holds Parquet and 'a.jsonl', of another form"),
        ({"a.jsonl": gzip.compress(b"{}")}, "is compressed by gzip; unpack the file"),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_what_would_be_read_in_part_or_not_at_all_is_named(
    files: dict[str, bytes], message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    (tmp_path / "x.jsonl").mkdir()
    for name, content in files.items():
        (tmp_path / "x.jsonl" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        take_samples(config_for(tmp_path / "x.jsonl"))


def test_a_store_that_does_not_answer_is_not_the_users_error(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch, config_for: Callable[..., Config]
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject")

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    monkeypatch.setattr("ray.data.read_parquet", gone)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        take_samples(config_for(tmp_path / "t.parquet"))


def harm_parquet(kind: str, path: Path) -> None:
    """A Parquet file with something wrong."""
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    column = {
        "dates": pa.array([1], pa.date32()),
        "times": pa.array([1], pa.timestamp("us")),
        "decimals": pa.array([Decimal(1)]),
        "bytes of no text": pa.array([b"\xff"], pa.binary()),
        "broken text": pa.StringArray.from_buffers(1, *pa.array([b"\xff"], pa.binary()).buffers()[1:]),
    }
    content = {
        "encrypted": whole[:-4] + b"PARE",
        "corrupt footer": whole[:-200] + b"\xff" * 150 + whole[-50:],
        "corrupt pages": whole[:20] + b"\xff" * 200 + whole[220:],
        "cut head": whole[100:],
    }
    if kind in column:
        pq.write_table(pa.table({"prompt": ["a"], "completion": column[kind]}), path)
    elif kind == "two of one name":
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "completion", "prompt"]), path)
    else:
        path.write_bytes(content[kind])


def harm_datasets(file: str, value: Any, path: Path) -> None:
    """A folder of `datasets` in which a JSON document is another one, or has another value for a key."""
    kind = DatasetDict({"train": Dataset.from_list(ROWS)}) if file == "dataset_dict.json" else Dataset.from_list(ROWS)
    for place in (path, path.parent / "secret"):
        kind.save_to_disk(place)
    document = json.loads((path / file).read_text()) | value if isinstance(value, dict) else value
    (path / file).write_text(json.dumps(document))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encrypted", "t.parquet: cannot be read .*encrypted.*; write the file anew"),
        ("corrupt footer", "t.parquet: cannot be read .*; write the file anew"),
        ("corrupt pages", "t.parquet: cannot be read .*; write the file anew"),
        ("cut head", "t.parquet: cannot be read"),
        ("two of one name", "t.parquet: cannot be read"),
        ("dates", "t.parquet: no row can be used .1 x a message without text or role"),
        ("times", "t.parquet: no row can be used .1 x a message without text or role"),
        ("decimals", "t.parquet: no row can be used .1 x a message without text or role"),
        ("bytes of no text", "t.parquet: no row can be used .1 x a text that is not valid Unicode"),
        ("broken text", "t.parquet: no row can be used .1 x a text that is not valid Unicode"),
    ],
)
def test_a_harmed_table_is_an_input_error(kind: str, message: str, tmp_path: Path, config_for: Callable[..., Config]) -> None:
    harm_parquet(kind, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        take_samples(config_for(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("file", "value"),
    [
        *(("state.json", value) for value in ([], "x", {"_data_files": None}, {"_data_files": [5]})),
        *(("dataset_info.json", value) for value in ([], {"features": 5})),
        *(("dataset_dict.json", value) for value in ([], {"splits": 5}, {"splits": ["../secret/train"]}, {"splits": [".."]})),
        *(
            ("state.json", {"_data_files": [{"filename": name}]})
            for name in ("/etc/passwd", "../secret/data-00000-of-00001.arrow")
        ),
    ],
)
def test_a_harmed_folder_of_datasets_is_an_input_error(
    file: str, value: Any, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    harm_datasets(file, value, tmp_path / "d")
    with pytest.raises(InputError, match=r"d: target.train is no folder that .datasets. saved whole"):
        take_samples(config_for(tmp_path / "d"))


@pytest.mark.usefixtures("ray_session")
def test_all_files_of_the_same_rows_give_the_same_splits(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion", "id"])
    writer.writeheader()
    writer.writerows({**row, "id": n} for n, row in enumerate(ROWS))
    files = {
        "capitals.JSONL": lines,
        "packed.jsonl.gz": gzip.compress(lines),
        "table.csv": b"\xef\xbb\xbf" + table.getvalue().encode(),
        "packed.csv.gz": gzip.compress(table.getvalue().encode()),
        "clone/data/train-00000-of-00001.jsonl": lines,
        "clone/data/test-00000-of-00001.jsonl": b"{}",
        "halves/b.jsonl": b"\n".join(lines.split(b"\n")[:20]),
        "halves/a.jsonl": b"\n".join(lines.split(b"\n")[20:]),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "TABLE.PARQUET")
    expected = take_samples(config_for(tmp_path / "capitals.JSONL"))
    assert expected.counts["train"]["used"] > 30
    for name in ("packed.jsonl.gz", "table.csv", "packed.csv.gz", "clone", "halves", "TABLE.PARQUET"):
        found = take_samples(config_for(tmp_path / name))
        assert found.training["train"].equals(expected.training["train"]), name


@pytest.mark.usefixtures("ray_session")
def test_texts_of_a_csv_file_stay_texts(tmp_path: Path, config_for: Callable[..., Config], tiny_base: str) -> None:
    rows = "\n".join(f'"What is {n},\nplus {n}?",{2 * n}' for n in range(40))
    (tmp_path / "t.csv").write_text(f"question,answer\n{rows}\n")
    columns = {"prompt": "question", "completion": "answer"}
    config = config_for(tmp_path / "t.csv")
    config = config.model_copy(update={"target": config.target.model_copy(update={"columns": columns})})
    assert take_samples(config).counts["train"] == {"used": 40} | {"repeated (trained on, sampled once)": 0}
    with pytest.raises(InputError, match=r"40 x of no known form: it has answer, question; rows need"):
        take_samples(config_for(tmp_path / "t.csv"))


@pytest.mark.usefixtures("ray_session")
def test_fields_that_a_table_adds_to_messages_do_not_count(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    call = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in ROWS
    ]
    more = [{"role": "assistant", "content": None, "tool_calls": call}, {"role": "tool", "content": "3"}]
    rows[0]["messages"][1:1] = more
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found, expected = (take_samples(config_for(tmp_path / name)) for name in ("t.parquet", "t.jsonl"))
    assert found.training["train"].equals(expected.training["train"])
    assert expected.counts["train"]["used"] == len(ROWS)


@pytest.mark.usefixtures("ray_session")
def test_a_column_that_a_csv_file_has_twice_is_named_if_it_is_wanted(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    rows = "".join(f"{row['prompt']},{row['completion']},x,y\n" for row in ROWS)
    (tmp_path / "fine.csv").write_text("prompt,completion,,\n" + rows)
    assert take_samples(config_for(tmp_path / "fine.csv")).counts["train"]["used"] > 30
    (tmp_path / "t.csv").write_text("prompt,completion,note,prompt\n" + rows)
    with pytest.raises(InputError, match=r"t.csv: cannot be read \(.*several columns are called 'prompt'\); write the file anew"):
        take_samples(config_for(tmp_path / "t.csv"))
    with pytest.raises(InputError, match="several columns are called 'prompt'"):
        next(first_rows(str(tmp_path / "t.csv"), "train"))
    (tmp_path / "t.csv").write_text("prompt,completion,note,note\n" + rows)
    assert unreadable(str(tmp_path / "t.csv"), "train") is None
    assert "called 'note'" in str(unreadable(str(tmp_path / "t.csv"), "train", ["note"]))


@pytest.mark.parametrize("packed", [True, False])
def test_a_lone_quotation_mark_takes_in_no_rows_unseen(packed: bool, tmp_path: Path) -> None:
    file = tmp_path / ("t.csv.gz" if packed else "t.csv")

    def read(text: str) -> list[bytes]:
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return list(first_rows(str(file), "train"))

    assert len(read('prompt,completion\nq,"a\nb"\nq,"a\nb\n"\n\n')) == 2
    assert len(read("prompt,completion\nq,a\n")) == 1
    with pytest.raises(InputError, match=r"a quotation mark has no other: 'a\\nq,b\\n"):
        read('prompt,completion\nq,"a\nq,b\n')


def test_a_row_of_a_csv_file_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * 3_000_000
    (tmp_path / "t.csv").write_text(f"prompt,completion\nq,b\n{long},a\nq,b\n")
    assert [len(json.loads(row)["prompt"]) for row in first_rows(str(tmp_path / "t.csv"), "train")] == [1, len(long), 1]
    monkeypatch.setattr(readers, "CSV_ROW_BYTES", 1 << 20)
    with pytest.raises(
        InputError, match=r"t.csv: cannot be read \(.*a row has more than 1 MiB, or a quotation mark has no other"
    ):
        list(first_rows(str(tmp_path / "t.csv"), "train"))


@pytest.mark.usefixtures("ray_session")
def test_a_table_that_is_no_text_is_named(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "t.csv").write_bytes("prompt,completion\nä,b\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"t.csv: cannot be read .*UTF8"):
        take_samples(config_for(tmp_path / "t.csv"))
