"""Target data of any known form -> its rows as JSON text: JSONL, a JSON array, Parquet, or a folder saved by `datasets`."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import ray

from pipeline.core.errors import InputError, is_transient, one_line
from pipeline.core.storage import Folder

LINES = (".jsonl", ".json")
COLUMNS = ("messages", "prompt", "completion")

GZIP = b"\x1f\x8b"

ARRAY_WITHIN = 1024
"""Bytes at the head of a file in which an array begins."""

NOT_UNICODE = ({"role": "assistant", "content": "\udcff"},)
"""Stands for a value of a table that cannot be decoded, so that its row is passed over for that reason."""


def read_rows(path: str, role: str) -> ray.data.Dataset:
    """A column `row` with each row of a data set as JSON text.

    Raises:
        InputError: it is of no known form.
    """
    folder = Folder.at(path)
    if folder.exists("dataset_dict.json") or folder.exists("dataset_info.json"):
        return _from_datasets(path, role)
    if _is_parquet(path, folder):
        if others := [name for name in _names(folder) if name.endswith(".jsonl")]:  # a .json may tell of the data
            raise InputError(f"{path}: target.{role} holds Parquet and {others[0]!r}, of another form; give files of one form")
        try:
            # A folder named prompt=x is a column to Ray, unless told otherwise.
            rows = ray.data.read_parquet(folder.path, filesystem=folder.files, partitioning=None)
            return rows.map_batches(_as_json, batch_format="pyarrow")
        except (OSError, pa.ArrowException) as error:
            if is_transient(error):
                raise
            otherwise = f"{path}: target.{role} is not valid Parquet ({one_line(error)}); give whole files of one schema"
            raise InputError(unreadable(path) or otherwise) from error
    if path.endswith(LINES):
        files = ray.data.read_binary_files(folder.path, filesystem=folder.files)
        return files.map_batches(_from_json, batch_size=1, batch_format="pyarrow")
    raise InputError(f"{path}: target.{role} must be .jsonl, .json, .parquet, a folder of .parquet or a folder saved by datasets")


def unreadable(path: str) -> str | None:
    """Which Parquet file of a data set cannot be read, and why.

    Raises:
        OSError: the store does not answer.
    """
    folder = Folder.at(path)
    names = _names(folder) if _is_parquet(path, folder) else []
    for name in [name for name in names if not name or name.endswith(".parquet")]:
        try:
            for _ in pads.dataset(folder.join(name), format="parquet", filesystem=folder.files).to_batches():
                pass
        except (OSError, pa.ArrowException) as error:
            if is_transient(error):
                raise
            return f"{folder.sub(name).uri if name else path}: cannot be read ({one_line(error)}); write the file anew"
    return None


def first_malformed(path: str) -> str:
    """Which line, or entry of an array, of a JSON data set is no row, and why."""
    for file, content in _contents(path):
        array = _array(content)
        for number, row in enumerate(content.split(b"\n") if array is None else array, start=1):
            if row.strip() and (fault := _fault(row)):
                return f"{file}: {'line' if array is None else 'entry'} {number} {fault}"
    return f"{path}: a row is not a JSON object"


def _contents(path: str) -> Iterator[tuple[str, bytes]]:
    """What the file at a path is called, and what it holds; or each of those in the folder there."""
    folder = Folder.at(path)
    for name in _names(folder):
        yield folder.sub(name).uri if name else path, folder.read_bytes(name)


def _names(folder: Folder) -> list[str]:
    """Of the files in a folder that Ray reads; of one file: an empty one."""
    if not folder.is_folder:
        return [""]
    names = sorted(info.path.removeprefix(f"{folder.path}/") for info in folder.walk())
    return [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]


def _fault(line: bytes) -> str | None:
    if line.startswith(GZIP):
        return "is compressed by gzip; unpack the file"
    if b"\0" in line:
        return "holds zero bytes, as UTF-16 does"
    try:
        return None if isinstance(json.loads(line), dict) else "is not a JSON object"
    except (ValueError, RecursionError) as error:
        return f"is malformed JSON ({error})"


def _from_datasets(path: str, role: str) -> ray.data.Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        _check_names(Folder.at(path))
        loaded = load_from_disk(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if is_transient(error):
            raise
        raise InputError(f"{path}: target.{role} is no folder that `datasets` saved whole ({one_line(error)})") from error
    if isinstance(loaded, DatasetDict):
        if role not in loaded:
            raise InputError(f"{path}: no split {role!r} in this data set (it has {', '.join(loaded)})")
        loaded = loaded[role]
    if not len(loaded):
        raise InputError(f"{path}: the data set is empty (target.{role})")
    return ray.data.from_huggingface(loaded).map_batches(_as_json, batch_format="pyarrow")


def _check_names(folder: Folder) -> None:
    """That a folder of `datasets` names no file but its own: it is read as a whole, whatever it names.

    Raises:
        ValueError: it does.
    """
    splits = folder.read_json("dataset_dict.json")["splits"] if folder.exists("dataset_dict.json") else []
    if outside := [name for name in splits if "/" in name or name == ".."]:
        raise ValueError(f"dataset_dict.json names {outside[0]!r}, which is outside of it")
    for part in [folder, *map(folder.sub, splits)]:
        files = part.read_json("state.json")["_data_files"] if part.exists("state.json") else []
        if outside := [file["filename"] for file in files if "/" in file["filename"]]:
            raise ValueError(f"state.json names {outside[0]!r}, which is outside of it")


def _is_parquet(path: str, folder: Folder) -> bool:
    return path.endswith(".parquet") or (folder.is_folder and any(folder.list_files(".parquet")))


def _as_json(batch: pa.Table) -> Iterator[pa.Table]:
    names = [name for name in COLUMNS if name in batch.column_names]
    values = [[_value(one) for one in batch[name]] for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)] if names else [{}] * batch.num_rows
    yield pa.table({"row": pa.array([json.dumps(row, default=_as_text).encode() for row in rows], pa.binary())})


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NOT_UNICODE


def _as_text(value: Any) -> Any:
    """Bytes as the text that they are where Spark or DuckDB wrote them; of a date, a number of decimals and the like no text."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else {type(value).__name__: str(value)}


def _from_json(batch: pa.Table) -> Iterator[pa.Table]:
    for content in batch["bytes"].to_pylist():
        rows = _array(content)
        if rows is None:  # str.splitlines would also cut at other line separators of Unicode, which JSON may hold
            rows = [line for line in content.split(b"\n") if line.strip()]
        yield pa.table({"row": pa.array(rows, pa.binary())})


def _array(content: bytes) -> list[bytes] | None:
    """The entries of a file that is one JSON array; None: it is another one."""
    if not content[:ARRAY_WITHIN].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return None
    try:
        return [json.dumps(row).encode() for row in json.loads(content)]
    except (ValueError, RecursionError):
        return None
