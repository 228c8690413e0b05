"""The adapters of object stores on this node's disk: each fetched once, ahead of need, within a limit of bytes.

    cache = AdapterCache()
    cache.prefetch(["s3://bucket/pool/a", "s3://bucket/pool/b"])  # back at once
    with cache.lease("s3://bucket/pool/a") as folder: ...

All processes of a user on a node share one folder (`core/node_folder.py`), in which an adapter is <digest>-<bytes>; the digest is
of its URI and of its files' sizes and times, so that a changed adapter is another one. Local adapters are used in place, and
those of the Hub are in the Hub's own cache.
What may pass of S3's errors is tried again by pyarrow (`core/whole_files.READ_ATTEMPTS`).
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
from pyarrow import fs

from pipeline.adapters.fetch import MAX_ADAPTER_BYTES, FetchError, locate, require_size, unfetched
from pipeline.adapters.pool import files_state
from pipeline.core.file_names import CARD_FILE, FILES, WEIGHTS_FILE
from pipeline.core.hub import HUB
from pipeline.core.node_folder import PARTIAL, obtain, private, remove
from pipeline.core.storage import MAX_HEADER_BYTES, Folder
from pipeline.core.uploads import PART_BYTES

MAX_CARD_BYTES = 1 << 20
MOST_IN_POD = 64 << 30
NAMES = "[0-9a-f]" * 32 + "-*"
SHARERS = 16
"""Processes of a node that may fetch at a time: each fetches no more than this share of the room before it looks again."""


class Hold(NamedTuple):
    """An adapter in use; `state` is that of its files where they come from, as of `pool.files_state`, and `lock` the open handle
    that keeps it on disk, where it is one of ours."""

    uri: str
    folder: Path
    state: str | None
    lock: int | None

    def end(self) -> None:
        if self.lock is not None:
            os.close(self.lock)


class AdapterCache:
    """This process's way to the node's cache. Its methods may be called from several threads."""

    def __init__(
        self,
        folder: Path | None = None,
        max_bytes: int | None = None,
        threads: int = 4,
        ahead: int = 16,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """
        Args:
            folder: where the adapters are kept; by default one of this user's in the machine's temporary folder.
            max_bytes: limit in bytes; passed only by what is in use or being fetched. None: half of what is free on the disk and
                what is here already; in a pod, where the limit of its volume cannot be seen, MOST_IN_POD.
            threads: fetches at the same time, for `prefetch`.
            ahead: prefetched adapters that may wait to be asked for; they count as in use.
            max_adapter_bytes: limit of one adapter; of a larger one nothing is fetched.
            check: given an adapter's folder before its weights are fetched, with their header alone in a file of their size. What
                it raises, `get` raises, and no more is fetched. It is not asked of what is here already.

        Raises:
            InputError: the folder cannot be made, or others can write to it.
        """
        self.folder = private(folder, "adapters")
        self.max_bytes = self._half_of_disk() if max_bytes is None else max_bytes
        self.max_adapter_bytes = max_adapter_bytes
        self.ahead, self.check = ahead, check
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapters")
        self._guard, self._room_guard = threading.Lock(), threading.Lock()
        self._room = 0
        self._coming: dict[str, Future[Hold]] = {}
        self._held: list[Hold] = []
        self._entries: dict[str, Path] = {}

    def prefetch(self, uris: Iterable[str]) -> None:
        """Start to fetch, in this order, and return at once; above `ahead`, it is left to a later call or to `get`."""
        with self._guard:
            for uri in uris:
                if uri not in self._coming and len(self._coming) < self.ahead:
                    self._coming[uri] = self._threads.submit(self._obtain, uri)

    def get(self, uri: str) -> Path:
        """The local folder of an adapter; as `hold`."""
        return self.hold(uri).folder

    def hold(self, uri: str) -> Hold:
        """An adapter, which stays until `release`; waits where it is being fetched, else fetches it.

        Raises:
            AdapterError: it cannot be fetched, is too large, or `check` says so.
            OSError: not now, but perhaps later; see `errors.is_transient`.
        """
        with self._guard:
            coming = self._coming.pop(uri, None)
        hold = coming.result() if coming else self._obtain(uri)
        with self._guard:
            self._held.append(hold)
        return hold

    def release(self, uri: str) -> None:
        """Give up an adapter that was got, or one that was prefetched and is not wanted any more."""
        with self._guard:
            hold = next((hold for hold in self._held if hold.uri == uri), None)
            if hold:
                self._held.remove(hold)
            coming = None if hold else self._coming.pop(uri, None)
        if hold:
            hold.end()
        if coming and not coming.cancel():
            coming.add_done_callback(lambda done: None if done.exception() else done.result().end())

    def let_go_first(self, uris: Iterable[str]) -> None:
        """Adapters that will not be wanted again: where room is short, they go before others."""
        for uri in uris:
            if entry := self._entries.pop(uri, None):
                with suppress(FileNotFoundError):
                    os.utime(entry, ns=(0, 0))

    @contextmanager
    def lease(self, uri: str) -> Iterator[Path]:
        """`get` on entry, `release` at the end."""
        folder = self.get(uri)
        try:
            yield folder
        finally:
            self.release(uri)

    def close(self) -> None:
        """Stop the fetches and release everything; what is whole stays on disk for others."""
        self._threads.shutdown(cancel_futures=True)
        for uri in [*(hold.uri for hold in self._held), *self._coming]:
            self.release(uri)

    def _obtain(self, uri: str) -> Hold:
        place = locate(uri, self.max_adapter_bytes)
        if isinstance(place, Path):
            return Hold(uri, place, None if uri.startswith(HUB) else files_state(_listed(Folder.at(place)), local=True), None)
        try:
            listed = _listed(place)
            entry, lock = self._lock_entry(place, listed)
        except OSError as error:
            raise unfetched(uri, error) from error
        self._entries[uri] = entry
        return Hold(uri, entry, files_state(listed, local=False), lock)

    def _lock_entry(self, store: Folder, listed: list[fs.FileInfo]) -> tuple[Path, int]:
        infos = _infos(store, listed)
        sizes = {info.base_name: info.size for info in infos}
        require_size(store.uri, sum(sizes.values()), self.max_adapter_bytes)
        entry = self.folder / _name(store.uri, infos)
        if entry.exists() and not all((entry / name).is_file() for name in sizes):
            remove(entry)  # cleaners of temporary folders take single files
        lock = obtain(entry, partial(self._fetch, store, sizes))
        now = time.time_ns()  # the kernel's own idea of it is too coarse to order uses by
        os.utime(entry, ns=(now, now))
        return entry, lock

    def _fetch(self, store: Folder, sizes: dict[str, int], files: Path) -> None:
        self._make_room(sum(sizes.values()))
        self._download(store, sizes, files)
        if {file.name: file.stat().st_size for file in files.iterdir()} != sizes:
            raise FetchError(f"cannot be fetched from {store.uri} (it changed meanwhile)")

    def _download(self, store: Folder, sizes: dict[str, int], target: Path) -> None:
        if self.check is None:
            store.download(list(sizes), target)
            return
        store.download([name for name in sizes if name != WEIGHTS_FILE], target)
        if WEIGHTS_FILE not in sizes:
            self.check(target)
            return
        with store.files.open_input_file(store.join(WEIGHTS_FILE)) as source, (target / WEIGHTS_FILE).open("wb") as file:
            _copy_header(source, file, sizes[WEIGHTS_FILE])
            self.check(target)
            shutil.copyfileobj(source, file, PART_BYTES)
            file.truncate()

    def _half_of_disk(self) -> int:
        here = sum(_size(path) for path in self.folder.glob(NAMES))
        half = (shutil.disk_usage(self.folder).free + here) // 2
        return min(half, MOST_IN_POD) if "KUBERNETES_SERVICE_HOST" in os.environ else half

    def _make_room(self, size: int) -> None:
        """Before an adapter of so many bytes is fetched. The folder is looked through once in many fetches, as that takes the
        longer the more there is in it."""
        with self._room_guard:
            if size > self._room:
                self._room = (self.max_bytes - self._clear()) // SHARERS
            else:
                self._room -= size

    def _clear(self) -> int:
        """Remove what killed processes left and, above the limit, the adapters used longest ago, with a little room to spare;
        never what is in use. Gives the bytes that stay."""
        total = 0
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.glob(NAMES):
            size = _size(path)
            with suppress(FileNotFoundError):
                if path.suffix == PARTIAL:
                    total += 0 if remove(path) else size  # fetches under way count in full
                else:
                    entries.append((path.stat().st_mtime_ns, size, path))
                    total += size
        if total > self.max_bytes:
            spared = self.max_bytes - self.max_bytes // SHARERS
            for _, size, path in sorted(entries):
                if (total > self.max_bytes or total - size >= spared) and remove(path):
                    total -= size
        return total


def _size(entry: Path) -> int:
    return int(entry.name.removesuffix(PARTIAL).rpartition("-")[2])


def _listed(folder: Folder) -> list[fs.FileInfo]:
    """What is in an adapter's folder, in one request."""
    return list(folder.files.get_file_info(fs.FileSelector(folder.path, allow_not_found=True)))


def _infos(store: Folder, listed: list[fs.FileInfo]) -> list[fs.FileInfo]:
    """Of those that are listed, an adapter's own files."""
    wanted = (info for info in listed if info.is_file and info.base_name in FILES)
    infos = sorted((info for info in wanted if not _is_no_card(info)), key=lambda info: info.base_name)
    if not infos:
        raise FetchError(f"cannot be fetched from {store.uri} (there is no adapter)")
    return infos


def _copy_header(source: pa.NativeFile, file: IO[bytes], size: int) -> None:
    """Copy the header of a safetensors file, and make a hole of the rest: it is read like the whole one. A header that is larger
    than any honest one is left out, and refused by its length."""
    length = source.read(8)
    file.write(length)
    if (count := int.from_bytes(length, "little")) <= MAX_HEADER_BYTES:
        file.write(source.read(count))
    file.truncate(size)


def _is_no_card(info: fs.FileInfo) -> bool:
    """Whether a file bears the name of a card, and is larger than any: it is not fetched."""
    return bool(info.base_name == CARD_FILE and info.size > MAX_CARD_BYTES)


def _name(uri: str, infos: list[fs.FileInfo]) -> str:
    state = [uri, *((info.base_name, info.size, info.mtime_ns) for info in infos)]
    return f"{hashlib.sha256(repr(state).encode()).hexdigest()[:32]}-{sum(info.size for info in infos)}"
