"""Folders on a local disk or an object store, through pyarrow's file systems.

Every table and document of a run is read and written here. All writing goes through `Folder.put`: whatever breaks it off, a
reader sees the old file or the whole new one. Until a local file is whole it is `.<id>.partial` beside its place; no listing
here shows that. A folder's file system is given to Ray as well: what Ray Train writes of its state is whole, too. What Ray Tune
copies of its own is not, and nothing here reads it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.core import uploads, whole_files
from pipeline.core.errors import InputError, is_transient
from pipeline.core.hub import HUB, HUB_DATA
from pipeline.core.whole_files import PARTIAL

LISTED_APART = 32
"""Folders directly below one that are listed side by side at most; more of them are mostly one adapter each."""


CHECKED = (".parquet", ".json", ".safetensors")
"""Ends of the names of files that are looked into for being whole."""

MAX_HEADER_BYTES = 16 << 20
"""Of a safetensors file; a tensor takes some 150."""

MAX_PATH = 4095
"""Bytes; Linux opens no longer one."""

ABANDONED = 3600.0
"""Seconds after which nobody is writing at a file any more."""

SECRET = re.compile(r"(?<=://)(?!anonymous@)[^/?#@\s]*@")
"""What stands before the bucket of s3://KEY:SECRET@bucket/folder; gs://anonymous@bucket is pyarrow's name for a public one."""

ONE_SLASH = re.compile(r"(s3|gs|gcs|hf|file):/(?!/)")

PLAIN_URI = re.compile(r"(?P<scheme>s3|gs|gcs)://(?P<bucket>[\w.-]+)(?P<path>(/[\w.~=+,@-]+)*)(?P<options>\?.*)?", re.ASCII)
"""Of an object store, without signs that stand for others."""

_BUCKETS: dict[tuple[Any, ...], fs.FileSystem] = {}
"""Those that this process has opened, by what they were opened with."""

NO_SECRET = "a location must hold no credentials, as it is shown and kept; set them in the environment"


def has_secret(uri: str) -> bool:
    """Whether a URI holds credentials."""
    return bool(SECRET.search(uri))


def without_secret(text: str) -> str:
    """A text with the credentials of every URI in it left out."""
    return SECRET.sub("...@", text)


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it. A bucket is opened once in a process, as each opening asks for credentials
    and for the bucket's region.

    Raises:
        InputError: the URI's scheme or bucket is unknown.
    """
    if uri.startswith(HUB_DATA):
        return _hub_data(uri)
    plain = PLAIN_URI.fullmatch(uri)
    key = (plain["scheme"], plain["bucket"], plain["options"], uploads.client_settings()) if plain else None
    if plain and key and key in _BUCKETS:
        return _BUCKETS[key], plain["bucket"] + plain["path"]
    try:
        files, path = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise InputError(f"{uri}: cannot open this location ({error}); use a local path, s3:// or gs://") from error
    if not path or isinstance(files, fs.PyFileSystem):
        raise InputError(f"{uri}: cannot open this location; use a local path, s3://BUCKET/... or gs://BUCKET/...")
    files = whole_files.writing_whole(files)
    if key:
        _BUCKETS[key] = files
    return files, path


def _hub_data(uri: str) -> tuple[fs.FileSystem, str]:
    """A data set of the Hub, read in place."""
    from huggingface_hub import HfFileSystem

    return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem())), uri.removeprefix(HUB).partition("?")[0]


def lies_in(path: str, folder: str) -> bool:
    """Whether a path or URI is a folder or below it, however the two are written. Neither is looked at."""
    inner, outer = (one.partition("?")[0].rstrip("/") if "://" in one else _absolute(one) for one in (path, folder))
    return f"{inner}/".startswith(f"{outer}/")


def _absolute(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))  # pathlib raises where a user is unknown or links go round


def is_path(path: str) -> bool:
    """Whether a path can be opened and written down: it is valid UTF-8, and not too long for the operating system."""
    return is_text(path) and len(path.encode()) <= MAX_PATH


def is_text(path: str) -> bool:
    """Whether a text can be encoded as UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Folder:
    """A folder at `path` inside a pyarrow file system; `uri` is how a user names it."""

    uri: str
    path: str
    files: fs.FileSystem

    @classmethod
    def at(cls, uri: str | Path) -> "Folder":
        """Open a local path, an object-store URI (`s3://`, `gs://`) or a data set of the Hub (`hf://datasets/ORG/NAME`, to read
        alone). Nothing is created.

        Raises:
            InputError: the URI's scheme or bucket is unknown, or it holds credentials.
        """
        text = str(uri) if str(uri).endswith("://") else str(uri).rstrip("/") or "/"
        if has_secret(text):
            raise InputError(f"{without_secret(text)}: {NO_SECRET}")
        if ONE_SLASH.match(text):
            raise InputError(f"{text}: a location of an object store has two slashes, as in s3://BUCKET/...")
        if "://" not in text:
            local = _absolute(text)
            return cls(local, local, whole_files.LocalFiles())
        files, path = _opened(text)
        return cls(path if isinstance(files, fs.LocalFileSystem) else text, path, files)

    @property
    def is_local(self) -> bool:
        return isinstance(self.files, fs.LocalFileSystem)

    @property
    def is_folder(self) -> bool:
        return self.files.get_file_info(self.path).type == fs.FileType.Directory

    def sub(self, *names: str) -> "Folder":
        tail = "/".join(names)
        # s3://bucket/folder?endpoint_override=...; in the path of a disk it is a sign like others
        start, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Folder(f"{start}/{tail}{mark}{options}", f"{self.path}/{tail}", self.files)

    def join(self, name: str = "") -> str:
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return self.files.get_file_info(self.join(name)).type != fs.FileType.NotFound

    def is_complete(self, name: str) -> bool:
        """Whether something is there, and no table, JSON document or safetensors file of it is cut short, as it may be after the
        machine lost power. Of a folder: what is directly in it."""
        info = self.files.get_file_info(self.join(name))
        if info.type == fs.FileType.Directory:
            return all(self.is_complete(f"{name}/{file}") for suffix in CHECKED for file in self.sub(name).list_files(suffix))
        try:
            if name.endswith(".parquet"):
                pq.read_metadata(self.join(name), filesystem=self.files)
            elif name.endswith(".json"):
                self.read_json(name)
            elif name.endswith(".safetensors"):
                return self._end_of_tensors(name) == info.size
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return False
        return info.type == fs.FileType.File

    def _end_of_tensors(self, name: str) -> int:
        """How many bytes a safetensors file should have, by its header; 0: it is none."""
        with self.files.open_input_stream(self.join(name)) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= MAX_HEADER_BYTES else {}
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        return 8 + length + max(ends) if ends else 0

    def checked_files(self, name: str) -> list[str]:
        """Names of the files that `is_complete` looks into: `name` itself, or those in a folder of that name, at any depth."""
        if self.files.get_file_info(self.join(name)).type != fs.FileType.Directory:
            return [name] if self.exists(name) and name.endswith(CHECKED) else []
        paths = (info.path.removeprefix(f"{self.path}/") for info in self.sub(name).walk())
        return sorted(path for path in paths if path.endswith(CHECKED))

    def walk(self) -> list[fs.FileInfo]:
        """Every file at any depth. An object store gives a thousand names a request, one request after the other: folders
        directly below are listed side by side where they are few. On a disk, links to folders are not followed, and names that
        are no text or too long are passed over, as pyarrow has no way to open them."""
        if self.is_local:
            paths = [f"{parent}/{name}" for parent, _, names in os.walk(self.path) for name in names if not _is_partial(name)]
            return [info for info in self.files.get_file_info([path for path in paths if is_path(path)]) if info.is_file]
        top = self.files.get_file_info(fs.FileSelector(self.path))
        below = [info.path for info in top if info.type == fs.FileType.Directory]
        if len(below) > LISTED_APART:
            return [info for info in self.files.get_file_info(fs.FileSelector(self.path, recursive=True)) if info.is_file]
        with ThreadPoolExecutor(max(1, len(below))) as threads:
            parts = threads.map(lambda path: self.files.get_file_info(fs.FileSelector(path, recursive=True)), below)
            return [info for part in (top, *parts) for info in part if info.is_file]

    def list_files(self, suffix: str = "") -> list[str]:
        """Names of the files directly in this folder that end in `suffix`, sorted; a missing folder has none."""
        found = self.files.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        names = (info.base_name for info in found if info.is_file)
        return sorted(name for name in names if name.endswith(suffix) and not _is_partial(name))

    def state(self) -> list[tuple[str, int, int]]:
        """Path, size in bytes and time in nanoseconds of every file at this location, a folder at any depth or one file, sorted:
        what differs once something there has changed. Nothing there: empty."""
        found = self.walk() if self.is_folder else self.files.get_file_info([self.path])
        return sorted((one.path, one.size, one.mtime_ns) for one in found if one.is_file)

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds since 1970 by the store's own clock; None where there is none."""
        when = self.files.get_file_info(self.join(name)).mtime_ns
        return None if when is None else when / 1e9

    def create(self) -> None:
        """Make the folder where it is missing.

        Raises:
            InputError: it cannot be written.
            OSError: the disk is full, or the store does not answer.
        """
        if self.uri.startswith(HUB_DATA):
            raise InputError(f"{self.uri}: data sets of the Hub can only be read; choose a folder")
        try:
            self.files.create_dir(self.path, recursive=True)
            if self.is_local and not os.access(self.path, os.W_OK):
                raise PermissionError("no write permission")
        except OSError as error:
            if is_transient(error):
                raise
            raise InputError(f"{self.uri}: cannot write here ({error}); choose another folder") from error

    def delete(self, name: str) -> None:
        """Remove a file or a folder, if it is there; another process may be removing it too."""
        kind = self.files.get_file_info(self.join(name)).type
        with suppress(FileNotFoundError):
            if kind == fs.FileType.Directory:
                self.files.delete_dir(self.join(name))
            elif kind == fs.FileType.File:
                self.files.delete_file(self.join(name))

    def sweep(self, now: float) -> None:
        """Remove what killed processes left half written on a disk ABANDONED seconds before `now`, a time by the disk's clock."""
        for path in Path(self.path).rglob(f".*{PARTIAL}") if self.is_local else ():
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def put(self, name: str, pieces: Iterator[bytes]) -> None:
        """Write a file of any size, in pieces as `whole_files.put` takes them. It is seen once it is whole."""
        whole_files.put(self.files, self.join(name), pieces)

    def write_bytes(self, name: str, content: bytes) -> None:
        self.put(name, whole_files.pieces_of(content))

    def copy_file(self, name: str, source: "Folder") -> None:
        """Copy the file `name` of another folder, of any size, a piece at a time, byte by byte as it is."""
        with source.files.open_input_stream(source.join(name), compression=None) as stream:
            self.put(name, iter(partial(stream.read, uploads.PART_BYTES), b""))

    def read_bytes(self, name: str) -> bytes:
        """What a file holds, of one version of it. S3 is asked for its size first and then for that many bytes, which are half
        of a file where a longer one has taken its place: they are read again, until it is the same one before and after."""
        while True:
            with self.files.open_input_stream(self.join(name)) as stream:
                version, content = stream.metadata(), stream.read()
            if self.is_local or self._version(name) == version:
                return bytes(content)

    def _version(self, name: str) -> Any:
        """What an object store says of a file: its ETag, size and time."""
        with self.files.open_input_stream(self.join(name)) as stream:
            return stream.metadata()

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise ValueError(f"{self.uri}/{name}: no valid JSON ({error})") from error

    def write_table(self, name: str, table: pa.Table, row_group_rows: int | None = None) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=row_group_rows)
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet table, one file or a folder of its parts, or these columns of it."""
        return pq.read_table(self.join(name), columns=columns, filesystem=self.files)

    def dataset(self, schema: pa.Schema, whole: bool = False) -> pads.Dataset:
        """The Parquet files in this folder as one lazily read data set; a missing folder gives an empty one.

        Args:
            whole: look at each first, and pass over those that are cut short.
        """
        names = [name for name in self.list_files(".parquet") if not whole or self.is_complete(name)]
        files = [self.join(name) for name in names]
        return pads.dataset(files, schema=schema, format="parquet", filesystem=self.files)

    def upload(self, source: Path, name: str) -> None:
        """Copy every file of the local folder `source` to `name`."""
        target, local = self.sub(name), Folder.at(source)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target.copy_file(file.relative_to(source).as_posix(), local)

    def download(self, names: list[str], target: Path) -> None:
        """Copy the files `names` of this folder into the local folder `target`; missing ones are passed over."""
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            with suppress(FileNotFoundError), self.files.open_input_stream(self.join(name)) as source:
                _copy(source, target / name)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)


def _copy(source: pa.NativeFile, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, uploads.PART_BYTES)  # an object store serves each read as one request
