"""Target data of any known form -> its rows as JSON text: JSONL, a JSON array, Parquet, or a folder saved by `datasets`.

JSONL is read by its blocks, ranges of bytes that are cut at line ends, one task each, however large the file; an array is whole.
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
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

BLOCK_BYTES = 8 << 20
"""Of JSON text that one task reads."""

LINE_END_WITHIN = 1 << 20
"""Bytes that are read at a time behind a block, for the rest of its last line."""

NOT_UNICODE = ({"role": "assistant", "content": "\udcff"},)
"""Stands for a value of a table that cannot be decoded, so that its row is passed over for that reason."""


class Block(NamedTuple):
    """Of a JSON file the lines that begin from byte `start` to before `stop`. An array is one block, whatever its size."""

    name: str
    start: int
    stop: int


def read_rows(path: str, role: str) -> ray.data.Dataset:
    """A column `row` with each row of a data set as JSON text. Of JSON files also the number of its `block` in `json_blocks`, and
    every line, blank ones too, so that lines can be counted.

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
        blocks = json_blocks(path)
        shares = [{"numbers": numbers.tolist()} for numbers in _shared_out(blocks)]
        tasks = ray.data.from_items(shares, override_num_blocks=len(shares))
        return tasks.map_batches(partial(_from_json, folder, blocks), batch_size=None, batch_format="pyarrow")
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


def json_blocks(path: str) -> list[Block]:
    """The blocks of all files of a JSON data set, in their order."""
    folder = Folder.at(path)
    names = _names(folder)
    found = folder.files.get_file_info([folder.join(name) for name in names])
    return [block for name, info in zip(names, found, strict=True) for block in _blocks(folder, name, info.size)]


def first_malformed(path: str, lines: Mapping[int, int], bad: int) -> str:
    """Which line, or entry of an array, of a block in which there is one is no row, and why.

    Args:
        lines: how many lines the blocks have, by their numbers.
        bad: number of the first block that has such a line.
    """
    folder, blocks = Folder.at(path), json_blocks(path)
    block = blocks[bad]
    before = sum(lines[other] for other in range(bad) if blocks[other].name == block.name)
    file, content = folder.sub(block.name).uri if block.name else path, _read_block(folder, block)
    array = _array(content) if block.start == 0 else None
    for number, row in enumerate(content.split(b"\n") if array is None else array, start=before + 1):
        if row.strip() and (fault := _fault(row)):
            return f"{file}: {'line' if array is None else 'entry'} {number} {fault}"
    return f"{file}: a row is not a JSON object"


def _blocks(folder: Folder, name: str, size: int) -> list[Block]:
    if size <= BLOCK_BYTES:
        return [Block(name, 0, size)]
    with folder.files.open_input_file(folder.join(name)) as file:
        cuts = [0, size] if _begins_array(file.read(ARRAY_WITHIN)) else [*range(0, size, BLOCK_BYTES), size]
    return [Block(name, start, stop) for start, stop in pairwise(cuts)]


def _shared_out(blocks: list[Block]) -> list[np.ndarray]:
    """Numbers of blocks for each task: one of usual size, or several that are small."""
    ends = np.cumsum([block.stop - block.start for block in blocks])
    tasks = (ends - 1) // BLOCK_BYTES
    return np.split(np.arange(len(blocks)), np.flatnonzero(np.diff(tasks)) + 1)


def _read_block(folder: Folder, block: Block) -> bytes:
    """The lines that begin in a block, the last one whole."""
    with folder.files.open_input_file(folder.join(block.name)) as file:
        before = max(0, block.start - 1)
        content = file.read_at(block.stop - before, before)
        if block.start:  # what comes before the first line end is of a line that began earlier
            content = content.partition(b"\n")[2]
        return content + _rest_of_line(file, block.stop) if content and not content.endswith(b"\n") else content


def _rest_of_line(file: pa.NativeFile, at: int) -> bytes:
    pieces: list[bytes] = []
    while piece := file.read_at(LINE_END_WITHIN, at):
        line, end, _ = piece.partition(b"\n")
        pieces.append(line + end)
        if end:
            break
        at += len(piece)
    return b"".join(pieces)


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
    if not Folder.at(path).is_local:  # a copy on this machine alone
        return ray.data.from_huggingface(loaded).map_batches(_as_json, batch_format="pyarrow")
    starts = range(0, len(loaded), max(1, len(loaded) * BLOCK_BYTES // max(1, loaded.data.nbytes)))
    shares = [{"start": start, "stop": min(start + starts.step, len(loaded))} for start in starts]
    tasks = ray.data.from_items(shares, override_num_blocks=len(shares))
    return tasks.map_batches(partial(_from_saved, loaded), batch_size=None, batch_format="pyarrow")


def _from_saved(saved: Any, batch: pa.Table) -> Iterator[pa.Table]:
    """Rows of a data set whose files are mapped into memory, by a task that opens them, too."""
    for share in batch.to_pylist():
        yield from _as_json(saved.with_format("arrow")[share["start"] : share["stop"]])


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


def _from_json(folder: Folder, blocks: list[Block], batch: pa.Table) -> pa.Table:
    return pa.concat_tables([_lines(folder, blocks[number], number) for number in batch["numbers"][0].as_py()])


def _lines(folder: Folder, block: Block, number: int) -> pa.Table:
    content = _read_block(folder, block)
    rows = _array(content) if block.start == 0 else None
    if rows is None:  # str.splitlines would also cut at other line separators of Unicode, which JSON may hold
        rows = content.removesuffix(b"\n").split(b"\n") if content else []
    return pa.table({"row": pa.array(rows, pa.binary()), "block": np.full(len(rows), number)})


def _begins_array(head: bytes) -> bool:
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array(content: bytes) -> list[bytes] | None:
    """The entries of a file that is one JSON array; None: it is another one."""
    if not _begins_array(content[:ARRAY_WITHIN]):
        return None
    try:
        return [json.dumps(row).encode() for row in json.loads(content)]
    except (ValueError, RecursionError):
        return None
