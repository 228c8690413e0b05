"""Target data of any known form -> its rows as JSON text: JSONL, a JSON array, CSV, Parquet, or a folder saved by `datasets`.

JSONL is read by its blocks, ranges of bytes that are cut at line ends, one task each, however large the file; an array, a CSV
file and what is packed by gzip are each read by one task.
"""

import codecs
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import ray

from pipeline.config import COLUMNS
from pipeline.core.errors import InputError, is_transient, one_line
from pipeline.core.storage import Folder
from pipeline.data.files import Source, is_packed, source_of

GZIP = b"\x1f\x8b"

ARRAY_WITHIN = 1024
"""Bytes at the head of a file in which an array begins."""

BLOCK_BYTES = 8 << 20
"""Of JSON text that one task reads."""

CSV_ROW_BYTES = 32 << 20
"""That a row of a CSV file may have at least: pyarrow reads so many at a time, and of a row that is longer nothing."""

ENDING = 256
"""Bytes of the end of a CSV file."""

FIRST = 100
"""Rows of a table that `first_rows` reads at a time."""

LINE_END_WITHIN = 1 << 20
"""Bytes that are read at a time behind a block, for the rest of its last line."""

NOT_UNICODE = ({"role": "assistant", "content": "\udcff"},)
"""Stands for a value of a table that cannot be decoded, so that its row is passed over for that reason."""

QUOTED = 40
"""Characters of a value that are told."""


class Block(NamedTuple):
    """Of a JSON file the lines that begin from byte `start` to before `stop`. An array is one block, whatever its size."""

    name: str
    start: int
    stop: int


def read_rows(path: str, role: str, columns: Sequence[str] = ()) -> ray.data.Dataset:
    """A column `row` with each row of a data set as JSON text. Of JSON files also the number of its `block` in `json_blocks`, and
    every line, blank ones too, so that lines can be counted.

    Args:
        columns: that are read beside those that `config.COLUMNS` names.

    Raises:
        InputError: it is of no known form.
    """
    source, wanted = source_of(path, role), (*COLUMNS, *columns)
    if source.form == "datasets":
        return _from_datasets(path, role, wanted)
    if source.form == "parquet":
        return _from_parquet(path, role, source, wanted)
    if source.form == "csv":
        tasks = ray.data.from_items([{"name": name} for name in source.names], override_num_blocks=len(source.names))
        return tasks.map_batches(partial(_from_csv, source, wanted), batch_size=None, batch_format="pyarrow")
    blocks = json_blocks(source)
    shares = [{"numbers": numbers.tolist()} for numbers in _shared_out(blocks)]
    tasks = ray.data.from_items(shares, override_num_blocks=len(shares))
    return tasks.map_batches(partial(_from_json, source.folder, blocks), batch_size=None, batch_format="pyarrow")


def first_rows(path: str, role: str, columns: Sequence[str] = ()) -> Iterator[bytes]:
    """The rows of a data set as JSON text, in the order of its files, without Ray; only so much is read as is asked for.

    Raises:
        InputError: it is of no known form, or cannot be read.
    """
    source, wanted = source_of(path, role), (*COLUMNS, *columns)
    try:
        for table in _first_tables(path, role, source, wanted):
            yield from (row for row in table["row"].to_pylist() if row.strip())
    except (OSError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        raise InputError(f"{path}: cannot be read ({one_line(error)}); write the file anew") from error


def _first_tables(path: str, role: str, source: Source, wanted: Sequence[str]) -> Iterator[pa.Table]:
    if source.form == "datasets":
        saved = _load_saved(path, role).with_format("arrow")
        for start in range(0, len(saved), FIRST):
            yield from _as_json(wanted, saved[start : start + FIRST])
    elif source.form == "lines":
        yield from (_lines(source.folder, block, number) for number, block in enumerate(json_blocks(source)))
    else:
        for batch in (batch for name in source.names for batch in _batches(source, name, wanted)):
            for start in range(0, len(batch), FIRST):
                yield from _as_json(wanted, pa.Table.from_batches([batch.slice(start, FIRST)]))


def unreadable(path: str, role: str, columns: Sequence[str] = ()) -> str | None:
    """Which Parquet or CSV file of a data set cannot be read, and why.

    Args:
        columns: as for `read_rows`.

    Raises:
        OSError: the store does not answer.
    """
    source = source_of(path, role)
    for name in source.names if source.form in ("parquet", "csv") else []:
        try:
            for _ in _batches(source, name, (*COLUMNS, *columns)):
                pass
        except (OSError, pa.ArrowException) as error:
            if is_transient(error):
                raise
            return f"{source.path(name)}: cannot be read ({one_line(error)}); write the file anew"
    return None


def _from_parquet(path: str, role: str, source: Source, wanted: Sequence[str]) -> ray.data.Dataset:
    files = [source.folder.join(name) for name in source.names]
    try:
        # A folder named prompt=x is a column to Ray, unless told otherwise; so would a suffix in capitals be no Parquet.
        rows = ray.data.read_parquet(files, filesystem=source.folder.files, partitioning=None, file_extensions=None)
        return rows.map_batches(partial(_as_json, wanted), batch_format="pyarrow")
    except (OSError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        otherwise = f"{path}: target.{role} is not valid Parquet ({one_line(error)}); give whole files of one schema"
        raise InputError(unreadable(path, role) or otherwise) from error


def _batches(source: Source, name: str, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a CSV or Parquet file, in its order."""
    if source.form == "csv":
        return _csv_batches(source, name, wanted)
    dataset = pads.dataset(source.folder.join(name), format="parquet", filesystem=source.folder.files)
    return iter(dataset.to_batches())


def _from_csv(source: Source, wanted: Sequence[str], batch: pa.Table) -> Iterator[pa.Table]:
    for name in batch["name"].to_pylist():
        for rows in _csv_batches(source, name, wanted):
            yield from _as_json(wanted, pa.Table.from_batches([rows]))


def _csv_batches(source: Source, name: str, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Its rows, all values as the texts that they are; an empty one is null.

    Raises:
        pa.ArrowInvalid: it is no CSV file, has two columns of a name that is wanted, a row too long, or an open quotation.
    """
    path = source.folder.join(name)
    parse = pacsv.ParseOptions(delimiter="\t" if ".tsv" in path.lower() else ",", newlines_in_values=True)
    texts = pacsv.ConvertOptions(default_column_type=pa.string(), strings_can_be_null=True, null_values=[""])
    blocks = pacsv.ReadOptions(block_size=CSV_ROW_BYTES)
    with source.folder.files.open_input_stream(path, compression="gzip" if is_packed(path) else None) as file:
        try:
            noted = _Noted(file)
            rows = pacsv.open_csv(noted, read_options=blocks, parse_options=parse, convert_options=texts)
            _check_header(rows.schema.names, wanted)
            batch = None
            for batch in rows:
                yield batch
            _check_end(batch, noted.last)
        except pa.ArrowInvalid as error:
            if "block boundaries" not in str(error):
                raise
            most = f"{CSV_ROW_BYTES >> 20} MiB"
            raise pa.ArrowInvalid(f"a row has more than {most}, or a quotation mark has no other") from error


class _Noted(io.RawIOBase):
    """A file, and the last bytes that were read of it."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file, self.last = file, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(size)
        self.last = (self.last + content)[-ENDING:]
        return content


def _check_header(names: Sequence[str], wanted: Sequence[str]) -> None:
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise pa.ArrowInvalid(f"several columns are called {twice[0]!r}")


def _check_end(batch: pa.RecordBatch | None, ending: bytes) -> None:
    """That the last row has not taken in what follows a lone quotation mark, to the end of the file. A value of several lines has
    one at its end."""
    last = batch.columns[-1][-1].as_py() if batch else None
    if last and "\n" in last and not ending.rstrip().endswith(b'"'):
        raise pa.ArrowInvalid(f"a quotation mark has no other: {last[:QUOTED]!r}")


def json_blocks(source: Source) -> list[Block]:
    """The blocks of all files of a JSON data set, in their order."""
    found = source.folder.files.get_file_info([source.folder.join(name) for name in source.names])
    sizes = zip(source.names, found, strict=True)
    return [block for name, info in sizes for block in _blocks(source.folder, name, info.size)]


def first_malformed(path: str, role: str, lines: Mapping[int, int], bad: int) -> str:
    """Which line, or entry of an array, of a block in which there is one is no row, and why.

    Args:
        lines: how many lines the blocks have, by their numbers.
        bad: number of the first block that has such a line.
    """
    source = source_of(path, role)
    blocks = json_blocks(source)
    block = blocks[bad]
    before = sum(lines[other] for other in range(bad) if blocks[other].name == block.name)
    file, content = source.path(block.name) if block.name else path, _read_block(source.folder, block)
    array = _array(content) if block.start == 0 else None
    for number, row in enumerate(content.split(b"\n") if array is None else array, start=before + 1):
        if row.strip() and (fault := _fault(row)):
            return f"{file}: {'line' if array is None else 'entry'} {number} {fault}"
    return f"{file}: a row is not a JSON object"


def _blocks(folder: Folder, name: str, size: int) -> list[Block]:
    if size <= BLOCK_BYTES or is_packed(folder.join(name)):
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
    if is_packed(path := folder.join(block.name)):
        with folder.files.open_input_stream(path, compression="gzip") as packed:
            return bytes(packed.read())
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


def _fault(line: bytes) -> str | None:
    if line.startswith(GZIP):
        return "is compressed by gzip; unpack the file"
    if b"\0" in line:
        return "holds zero bytes, as UTF-16 does"
    try:
        return None if isinstance(json.loads(line), dict) else "is not a JSON object"
    except (ValueError, RecursionError) as error:
        return f"is malformed JSON ({error})"


def _load_saved(path: str, role: str) -> Any:
    """The split of a folder that `datasets` saved.

    Raises:
        InputError: it cannot be read, lacks the split or is empty.
    """
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
    return loaded


def _from_datasets(path: str, role: str, wanted: Sequence[str]) -> ray.data.Dataset:
    loaded = _load_saved(path, role)
    if not Folder.at(path).is_local:  # a copy on this machine alone
        return ray.data.from_huggingface(loaded).map_batches(partial(_as_json, wanted), batch_format="pyarrow")
    starts = range(0, len(loaded), max(1, len(loaded) * BLOCK_BYTES // max(1, loaded.data.nbytes)))
    shares = [{"start": start, "stop": min(start + starts.step, len(loaded))} for start in starts]
    tasks = ray.data.from_items(shares, override_num_blocks=len(shares))
    return tasks.map_batches(partial(_from_saved, loaded, wanted), batch_size=None, batch_format="pyarrow")


def _from_saved(saved: Any, wanted: Sequence[str], batch: pa.Table) -> Iterator[pa.Table]:
    """Rows of a data set whose files are mapped into memory, by a task that opens them, too."""
    for share in batch.to_pylist():
        yield from _as_json(wanted, saved.with_format("arrow")[share["start"] : share["stop"]])


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


def _as_json(wanted: Sequence[str], batch: pa.Table) -> Iterator[pa.Table]:
    """Rows of a table, with the columns that are wanted; of others just the name, for who is told what there is."""
    names = [name for name in dict.fromkeys(wanted) if name in batch.column_names]
    others = dict.fromkeys(set(batch.column_names) - set(names), True)
    values = [[_value(one) for one in batch[name]] for name in names]
    rows = [others | dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)] if names else [others] * len(batch)
    yield pa.table({"row": pa.array([json.dumps(row, default=_as_text).encode() for row in rows], pa.binary())})


def _value(scalar: pa.Scalar) -> Any:
    try:
        return _without_nulls(scalar.as_py())
    except UnicodeDecodeError:
        return NOT_UNICODE


def _without_nulls(value: Any) -> Any:
    """A table gives each of its objects all fields that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


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
