"""Every kind of write that a run does, again and again, in a process of its own; and how to see that what is read is whole."""

import hashlib
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import uploads
from pipeline.core.storage import Folder
from pipeline.core.tables import SCORES
from pipeline.search.score_store import ScoreStore

PART = 1 << 16
"""Of an upload, in bytes: small, so that a test's files have many."""


def content(number: int, size: int) -> bytes:
    """The number-th version of a file: it tells whether it is whole."""
    body = b"%d:" % number + random.Random(number).randbytes(size)
    return hashlib.sha256(body).digest() + body


def check(found: bytes) -> None:
    assert hashlib.sha256(found[32:]).digest() == found[:32], f"{len(found)} bytes of a version"


def _write_stream(folder: Folder, number: int) -> None:
    """As Ray writes its own documents."""
    with folder.files.open_output_stream(folder.join("file")) as stream:
        stream.write(content(number, 2_000))


def _copy(folder: Folder, number: int) -> None:
    source = Folder("memory", "", cast(Any, _Memory(content(number, 6 * PART))))
    folder.copy_file("file", source)


def _upload(folder: Folder, number: int) -> None:
    local = Path(f"/tmp/{os.getpid()}-{number}")
    local.mkdir()
    (local / "file").write_bytes(content(number, 3 * PART))
    try:
        folder.upload(local, "folder")
    finally:
        (local / "file").unlink()
        local.rmdir()


def _store(folder: Folder, number: int) -> None:
    rows = {"adapter_id": ["a"] * 16, "sample_id": map(str, range(16)), "nll_sum": [1.0] * 16}
    columns = [list(rows[name]) if name in rows else [number] * 16 for name in SCORES.names]
    ScoreStore(folder).write(pa.table(columns, SCORES.names).cast(SCORES), {"a": f"hash{number}"})


class _Memory:
    """A file system whose only file is in memory."""

    def __init__(self, held: bytes):
        self._held = held

    def open_input_stream(self, path: str, compression: None = None) -> BytesIO:
        return BytesIO(self._held)


WRITES: dict[str, Callable[[Folder, int], None]] = {
    "write_bytes": lambda folder, number: folder.write_bytes("file", content(number, 2_000)),
    "write_text": lambda folder, number: folder.write_text("file", f"{number}\n" * 500),
    "write_json": lambda folder, number: folder.write_json("file", {"number": number, "all": [number] * 500}),
    "write_table": lambda folder, number: folder.write_table("file", pa.table({"n": [number] * 500})),
    "copy_file": _copy,
    "upload": _upload,
    "score store": _store,
    "a stream of Ray's": _write_stream,
}


def _read_text(folder: Folder) -> None:
    lines = folder.read_text("file").splitlines()
    assert len(lines) == 500
    assert len(set(lines)) == 1


def _read_json(folder: Folder) -> None:
    found = folder.read_json("file")
    assert found["all"] == [found["number"]] * 500


def _read_table(folder: Folder) -> None:
    found = pa.BufferReader(folder.read_bytes("file"))
    numbers = pq.read_table(found)["n"].to_pylist()
    assert len(numbers) == 500
    assert len(set(numbers)) == 1


_WHOLE: set[str] = set()
"""Files of scores that were seen whole. None is written again: to read all of them at each look takes minutes of a test."""


def _read_store(folder: Folder) -> None:
    for name in folder.list_files(".parquet"):
        if (uri := folder.join(name)) not in _WHOLE:
            assert len(folder.read_table(name)) == 16
            _WHOLE.add(uri)


READS: dict[str, Callable[[Folder], None]] = {
    "write_text": _read_text,
    "write_json": _read_json,
    "write_table": _read_table,
    "upload": lambda folder: check(folder.read_bytes("folder/file")),
    "score store": _read_store,
}
"""How a version is looked at; by default its digest is."""


def write_on(uri: str, kind: str, first: int, environment: dict[str, str], told: Connection) -> None:
    """What a writer's process does: one version after the other, until it is killed. Says so once the first is written."""
    os.environ |= environment
    uploads.PART_BYTES = PART
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Folder.at(uri)
    for number in itertools.count(first):
        WRITES[kind](folder, number)
        if number == first:
            told.send(number)
