"""File systems on which a file appears whole or not at all, whatever breaks its writing off.

`put` is the one way in which anything of ours is written. The file systems here are pyarrow's own, except that
`open_output_stream` goes the same way: they are given to Ray, which writes its state to a run folder with it. pyarrow's would
leave what was written so far under the final name: a disk shows it at once, and an object store when the stream is closed, also
by an exception.
"""

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pyarrow import fs

from pipeline.core import uploads

PARTIAL = ".partial"
"""Ends the names of files that are being written on a disk; they begin with a dot."""
READ_ATTEMPTS = 11
"""Of a request to S3 that reads. The pauses between them double, up to 20 s: one to two minutes in all."""


def put(files: fs.FileSystem, path: str, pieces: Iterator[bytes]) -> None:
    """Write a file and the folders above it.

    Args:
        pieces: of its content, of uploads.PART_BYTES each but for the last. What they raise is raised, and the old file stays.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    if uploads.takes(files):
        uploads.put(files, path, pieces)
        return
    parent = path.rpartition("/")[0]
    unfinished = f"{parent}/.{uuid.uuid4().hex}{PARTIAL}"
    try:
        if isinstance(files, fs.LocalFileSystem):
            Path(parent).mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as local:
                local.writelines(pieces)
                local.flush()
                os.fsync(local.fileno())  # a machine that loses power has the old file, or the whole new one
            os.replace(unfinished, path)
            return
        files.create_dir(parent, recursive=True)
        with files.open_output_stream(unfinished, compression=None) as stream:
            for piece in pieces:
                stream.write(piece)
        files.move(unfinished, path)
    except BaseException:  # a full disk, for one: what is half written only takes more of it
        with suppress(FileNotFoundError):
            files.delete_file(unfinished)
        raise


def pieces_of(content: bytes) -> Iterator[bytes]:
    """A content in pieces as `put` takes them."""
    view = memoryview(content)
    return (bytes(view[start : start + uploads.PART_BYTES]) for start in range(0, len(content), uploads.PART_BYTES))


def writing_whole(files: fs.FileSystem) -> fs.FileSystem:
    """The same file system, on which others write whole files, too; one that is not known here stays as it is.

    Of those that were made alike there is one in a process: each asks for credentials of its own, and opens connections.
    """
    kind = next((kind for kind in (LocalFiles, S3Files, GcsFiles) if type(files) is kind.__base__), None)
    return files if kind is None else _shared(kind, uploads.options(files))


def _shared(kind: type[fs.FileSystem], options: dict[str, Any]) -> fs.FileSystem:
    key = (kind, repr(sorted(options.items())), uploads.client_settings())
    if key not in _SHARED:
        _SHARED[key] = kind(**options)
    return _SHARED[key]


_SHARED: dict[tuple[Any, ...], fs.FileSystem] = {}


class _Stream:
    """What is written is kept in memory. It is a file once the stream is closed; not where its `with` ends by an exception."""

    def __init__(self, files: fs.FileSystem, path: str) -> None:
        self._files, self._path, self._content = files, path, io.BytesIO()

    def write(self, content: bytes) -> int:
        return self._content.write(content)

    def close(self) -> None:
        if not self._content.closed:
            put(self._files, self._path, pieces_of(self._content.getvalue()))
            self._content.close()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind:
            self._content.close()
        self.close()


class LocalFiles(fs.LocalFileSystem):
    def open_output_stream(self, path: str, **settings: Any) -> _Stream:
        return _Stream(self, path)

    def __reduce__(self) -> Any:
        return LocalFiles, ()


class S3Files(fs.S3FileSystem):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=READ_ATTEMPTS))

    def open_output_stream(self, path: str, **settings: Any) -> _Stream:
        return _Stream(self, path)

    def __reduce__(self) -> Any:
        return _shared, (S3Files, uploads.options(self))


class GcsFiles(fs.GcsFileSystem):
    def open_output_stream(self, path: str, **settings: Any) -> _Stream:
        return _Stream(self, path)

    def __reduce__(self) -> Any:
        return _shared, (GcsFiles, uploads.options(self))
