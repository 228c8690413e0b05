"""What the tasks that tokenise leave for the draw: usable rows in shards, sorted by draw key, and a report of each.

A draw key is a number of 64 bits, and as a hash any is as likely as any other. So all draw keys are cut into RANGES of equal
size, and a shard has its rows in as many pieces: a task that sorts some ranges reads their pieces of each shard alone. The hashes
of the rows are written apart, as the draw needs nothing else.
"""

import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from pipeline.core.storage import Folder
from pipeline.core.tables import TEST

RANGES = 512
"""Of draw keys; as many parts as a split may have."""

LEAST = np.arange(RANGES, dtype=np.uint64) * np.uint64((1 << 64) // RANGES)
"""The least draw key of each range."""

READ_AT_ONCE = 8
"""Shards that a task reads side by side."""

MAX_REASONS = 1000
"""Reasons to pass rows over that a shard tells apart."""

OTHER_REASONS = "other reasons"

USED, USED_BUT = "used", "used, but "
"""In counts of rows by reasons: those that were not passed over, and the beginning of what is to be said of some of these."""

ROWS = pa.schema([("draw_key", pa.uint64()), *(field for field in TEST if field.name != "split")])
HASHES = pa.schema([ROWS.field("draw_key"), ROWS.field("sample_id")])
IN_ORDER = [("draw_key", "ascending"), ("sample_id", "ascending")]

SHARDS = pa.schema(
    [
        ("name", pa.string()),
        ("role", pa.string()),
        ("problems", pa.map_(pa.string(), pa.int64())),  # rows by why they were passed over; USED: they were not
        ("lines", pa.map_(pa.int64(), pa.int64())),  # as in Lines
        ("malformed", pa.list_(pa.int64())),
        ("bytes", pa.int64()),  # of the rows in memory
        ("counts", pa.list_(pa.int64())),  # rows in each range
        ("hashes_at", pa.list_(pa.int64())),  # where the piece of each range begins, and where the last ends
        ("rows_at", pa.list_(pa.int64())),
    ]
)
"""The report of a shard."""


class Lines(NamedTuple):
    """Of a JSON file's blocks, by their numbers: how many lines each has, blank ones too, and which have one that is no row."""

    counts: dict[int, int]
    malformed: list[int]


def write_shard(folder: Folder, role: str, found: pa.Table, lines: Lines) -> pa.Table:
    """Leave what can be used of some rows in `folder`. Gives the report, schema SHARDS; what nobody has a report of, such as that
    of a task which was tried again, counts for nothing.

    Args:
        found: the rows, schema TOKENISED.
    """
    rows = found.filter(pc.is_null(found["problem"])).select(ROWS.names).sort_by(IN_ORDER)
    bounds = [*np.searchsorted(rows["draw_key"].to_numpy(), LEAST).tolist(), len(rows)]
    name = uuid.uuid4().hex
    report = {
        "name": name,
        "role": role,
        "problems": list(shortened(_reasons(found), MAX_REASONS).items()),
        "lines": list(lines.counts.items()),
        "malformed": lines.malformed,
        "bytes": rows.nbytes,
        "counts": [end - start for start, end in pairwise(bounds)],
        "hashes_at": _write_pieces(folder, f"{name}.hashes", rows.select(HASHES.names), bounds),
        "rows_at": _write_pieces(folder, f"{name}.rows", rows, bounds),
    }
    return pa.Table.from_pylist([report], schema=SHARDS)


def _reasons(found: pa.Table) -> Counter[str]:
    """Rows by why they were passed over; those that were not under USED, and once more by what is to be said of them."""
    notes = (f"{USED_BUT}{note}" for note in found["note"].drop_null().to_pylist())
    return Counter([*found["problem"].fill_null(USED).to_pylist(), *notes])


def read_pieces(folder: Folder, shards: pa.Table, kind: str, first: int, end: int) -> pa.Table:
    """The rows of some shards whose draw keys are in the ranges from `first` to before `end`, in their order.

    Args:
        kind: `rows`, or `hashes` for those alone.
    """

    def read(name: str, ends: list[int]) -> list[pa.Table]:
        return list(_read_shard(folder, f"{name}.{kind}", ends))

    ends = pc.list_slice(shards[f"{kind}_at"], first, end + 1).to_pylist()
    with ThreadPoolExecutor(READ_AT_ONCE) as threads:
        found = list(chain.from_iterable(threads.map(read, shards["name"].to_pylist(), ends)))
    return pa.concat_tables(found).sort_by(IN_ORDER) if found else (ROWS if kind == "rows" else HASHES).empty_table()


def shortened(problems: Counter[str], most: int) -> dict[str, int]:
    """The commonest reasons, and how many rows there are of all others."""
    others = problems.pop(OTHER_REASONS, 0)
    common = dict(problems.most_common(most))
    others += problems.total() - sum(common.values())
    return common | ({OTHER_REASONS: others} if others else {})


def _write_pieces(folder: Folder, name: str, rows: pa.Table, bounds: list[int]) -> list[int]:
    pieces = [_as_bytes(rows.slice(start, end - start)) for start, end in pairwise(bounds)]
    folder.write_bytes(name, b"".join(pieces))
    return [0, *accumulate(map(len, pieces))]


def _as_bytes(rows: pa.Table) -> bytes:
    if not len(rows):
        return b""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, rows.schema, options=ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(rows.combine_chunks())
    return sink.getvalue().to_pybytes()


def _read_shard(folder: Folder, name: str, ends: list[int]) -> Iterator[pa.Table]:
    if ends[0] == ends[-1]:
        return
    with folder.files.open_input_file(folder.join(name)) as file:
        content = memoryview(file.read_at(ends[-1] - ends[0], ends[0]))
    for start, end in pairwise(ends):
        if end > start:
            yield ipc.open_stream(content[start - ends[0] : end - ends[0]]).read_all()
