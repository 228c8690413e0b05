"""Python imports this module first in every process that has its folder on PYTHONPATH, Ray's workers among them: it makes the
storage behave as badly as the file named by MASHUP_FAULT says, for as long as that file is there. See tests/test_disturbed.py."""

import errno
import importlib.abc
import importlib.util
import os
import random
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FLAG = os.environ["MASHUP_FAULT"]
WRITES = ("write_bytes", "upload", "create")
READS = ("read_bytes", "read_table", "dataset", "exists", "list_files", "walk", "download")
DAY = 86_400


def fault() -> str:
    """The kind of fault that there is at the moment; empty: none."""
    try:
        with open(FLAG) as file:
            return file.read()
    except OSError:
        return ""


def misbehave(method: str) -> None:
    """What the storage does instead of, or before, what it was asked."""
    kind = fault()
    if kind == "slow":
        time.sleep(random.uniform(0, 0.5))
    elif kind == "full" and method in WRITES:
        raise OSError(errno.ENOSPC, "No space left on device")
    elif kind == "gone" or (kind == "wrong" and random.random() < 0.2):
        raise OSError(errno.EIO, "AWS Error NETWORK_CONNECTION during a request: curlCode: 7")


def patch(storage: ModuleType) -> None:
    for name in (*WRITES, *READS):
        setattr(storage.Folder, name, badly(name, getattr(storage.Folder, name)))


def badly(name: str, method: Any) -> Any:
    def call(folder: Any, *args: Any, **kwargs: Any) -> Any:
        misbehave(name)
        return method(folder, *args, **kwargs)

    return call


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
