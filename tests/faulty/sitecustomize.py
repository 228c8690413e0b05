"""Python imports this module first in every process that has its folder on PYTHONPATH, Ray's workers among them: it makes the
storage behave as badly as the file named by MASHUP_FAULT says, for as long as that file is there. See tests/test_disturbed.py.

Our own files and those of Ray Train and Ray Tune go through the file system of `Folder.at`, and through pyarrow's `copy_files`.
"""

import errno
import importlib.abc
import importlib.util
import os
import random
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FLAG = os.environ["MASHUP_FAULT"]
WRONG = 0.1
"""Share of the requests that fail while some do."""
DAY = 86_400


def fault() -> str:
    """The kind of fault that there is at the moment; empty: none."""
    try:
        with open(FLAG) as file:
            return file.read()
    except OSError:
        return ""


def misbehave() -> None:
    """What the storage does instead of, or before, what it was asked."""
    kind = fault()
    if kind == "slow":
        time.sleep(random.uniform(0, 0.2))
    elif kind == "gone" or (kind == "wrong" and random.random() < WRONG):
        raise OSError(errno.EIO, "AWS Error NETWORK_CONNECTION during a request: curlCode: 7")


def require_space() -> None:
    if fault() == "full":
        raise OSError(errno.ENOSPC, "No space left on device")


class Filling:
    """An output stream on a disk that may be full: what is written is then cut short."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stream.close()

    def write(self, content: bytes) -> int:
        if fault() == "full":
            self.stream.write(content[: len(content) // 2])
        require_space()
        return int(self.stream.write(content))


def badly(method: Any, *before: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        for check in (misbehave, *before):
            check()
        return method(*args, **kwargs)

    return call


def bad_disk(disk: type) -> type:
    """A class of local file systems that misbehave. It is known here by its name, so that processes can send it to each other."""

    class BadDisk(disk):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return make_bad_disk, ()

        def open_output_stream(self, *args: Any, **kwargs: Any) -> Filling:
            misbehave()
            return Filling(super().open_output_stream(*args, **kwargs))

    for name in ("create_dir", "move", "delete_dir", "delete_file", "get_file_info", "open_input_stream", "open_input_file"):
        setattr(BadDisk, name, badly(getattr(disk, name), *([require_space] if name == "create_dir" else [])))
    return BadDisk


def make_bad_disk() -> Any:
    from pipeline.storage import Folder

    return Folder.at("/").files


def patch(storage: ModuleType) -> None:
    """Folders stand on a bad disk. What pyarrow does in C++, beyond the methods of a disk's class, misbehaves as a whole."""
    at, files = storage.Folder.at, storage.fs
    disk = bad_disk(files.LocalFileSystem)()

    def on_a_bad_disk(uri: Any) -> Any:
        folder = at(uri)
        return replace(folder, files=disk) if folder.is_local else folder

    storage.Folder.at = on_a_bad_disk
    for name in ("read_table", "dataset", "walk"):
        setattr(storage.Folder, name, badly(getattr(storage.Folder, name)))
    files.copy_files = badly(files.copy_files, require_space)


class Finder(importlib.abc.MetaPathFinder):
    """Patches `pipeline.storage` once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "pipeline.storage":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
wall_clock = time.time


def jumping() -> float:
    """The wall clock, a day wrong while it is said to jump."""
    return wall_clock() + {"clock on": DAY, "clock back": -DAY}.get(fault(), 0)


time.time = jumping
