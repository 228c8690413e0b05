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
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
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


def filling(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """A file's content on its way to a place that may be full, or that may fail half-way."""
    for piece in pieces:
        misbehave()
        if fault() == "full":
            yield piece[: len(piece) // 2]
        require_space()
        yield piece


def badly(method: Any, *before: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        for check in (misbehave, *before):
            check()
        return method(*args, **kwargs)

    return call


METHODS = ("move", "delete_dir", "delete_file", "get_file_info", "open_input_stream", "open_input_file")


@cache
def bad(kind: type) -> type:
    """A class of file systems that misbehave as `kind` does not. It is known here by its name, so that processes can send it to
    each other."""

    class Bad(kind):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return made_bad, super().__reduce__()

    Bad.create_dir = badly(kind.create_dir, require_space)  # type: ignore[attr-defined]
    for name in METHODS:
        setattr(Bad, name, badly(getattr(kind, name)))
    return Bad


def made_bad(make: Any, given: tuple[Any, ...]) -> Any:
    """The like of a file system that `make(*given)` gives, which misbehaves."""
    good = make(*given)
    from pipeline.core.uploads import options

    return bad(type(good))(**options(good))


def patch(storage: ModuleType) -> None:
    """Folders stand on a bad disk, or in a bad store. What pyarrow does in C++, beyond the methods of a file system's class,
    misbehaves as a whole."""
    at, files, put = storage.Folder.at, storage.fs, storage.whole_files.put

    def on_a_bad_place(uri: Any) -> Any:
        folder = at(uri)
        return replace(folder, files=made_bad(lambda: folder.files, ()))

    storage.Folder.at = on_a_bad_place
    storage.whole_files.put = lambda files, path, pieces: badly(put)(files, path, filling(pieces))
    for name in ("read_table", "dataset", "walk"):
        setattr(storage.Folder, name, badly(getattr(storage.Folder, name)))
    files.copy_files = badly(files.copy_files, require_space)


class Finder(importlib.abc.MetaPathFinder):
    """Patches `pipeline.core.storage` once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "pipeline.core.storage":
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
