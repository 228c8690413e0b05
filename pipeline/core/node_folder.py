"""Folders on this node's disk that all processes of a user share, without a server between them.

    <name>            what is whole; who uses it holds a shared lock on the folder
    <name>.partial    holds one that is being made or removed; who does so holds an exclusive lock on it, and others who want it
                      wait for that lock. It is never itself the folder, or they would wait for its users

The locks are the kernel's (flock). They end with their process, however it ends, so there is no guessing by time: what can be
locked exclusively is in nobody's use.
"""

import fcntl
import os
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from pipeline.core.errors import InputError

PARTIAL = ".partial"


def private(folder: Path | None, name: str) -> Path:
    """Make a folder that only this user can write to; in a shared temporary folder another user may have been first.

    Args:
        folder: None: one in the machine's temporary folder.
        name: of what it is for.

    Raises:
        InputError: it cannot be made, or others can write to it.
    """
    # With the node's name: where several nodes have one disk, a lock of one is not seen from the others.
    folder = folder or Path(tempfile.gettempdir()) / f"mashup-{name}-{os.getuid()}-{socket.gethostname()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise InputError(f"{folder}: {name} cannot be kept here ({error}); set TMPDIR to another folder") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{folder}: {name} cannot be kept here, as others can write to it; set TMPDIR to another folder")
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder. What a process that is killed leaves of its own goes with the next one on this node.

    Raises:
        InputError: as `private`.
    """
    folder, held = _new_temporary_folder()
    try:
        yield folder
    finally:
        os.close(held)
        remove(folder)


@cache
def folder_of_process() -> Path:
    """As `temporary_folder`, but kept until this process has ended."""
    return _new_temporary_folder()[0]


def remove_unused(shared: Path) -> None:
    """Remove what processes that are gone left in a folder of `private`."""
    for left in shared.iterdir():
        remove(left)


def _new_temporary_folder() -> tuple[Path, int]:
    shared = private(None, "temporary")
    remove_unused(shared)
    folder = shared / uuid.uuid4().hex
    return folder, obtain(folder, Path.mkdir)


def obtain(entry: Path, make: Callable[[Path], None]) -> int:
    """A handle that keeps the folder `entry` on disk for as long as it is open. Where the folder is not there, `make` fills one,
    given its path, or another process is waited for that does so."""
    held = lock(entry, fcntl.LOCK_SH)
    while held is None:
        held = _make(entry, make)
    return held


def _make(entry: Path, make: Callable[[Path], None]) -> int | None:
    """Make a folder, or wait for who does. Gives a shared lock on it; None where another came between."""
    partial = entry.with_name(entry.name + PARTIAL)
    with suppress(FileExistsError):
        partial.mkdir(mode=0o700)
    turn = lock(partial, fcntl.LOCK_EX)
    if turn is None:
        return None
    try:
        if entry.exists():
            return lock(entry, fcntl.LOCK_SH)
        files = partial / "files"
        shutil.rmtree(files, ignore_errors=True)  # of one that ended half-way
        make(files)
        held = lock(files, fcntl.LOCK_SH)
        files.rename(entry)
        return held
    finally:
        os.close(turn)
        remove(partial)


def lock(folder: Path, kind: int) -> int | None:
    """A handle that locks a folder; None where it is gone, is a stray file or, with LOCK_NB, in use."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    held = False
    try:
        fcntl.flock(handle, kind)
        held = os.path.samestat(os.fstat(handle), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not held:  # it was renamed, removed or made anew while we waited
            os.close(handle)
    return handle if held else None


def remove(folder: Path) -> bool:
    """Remove a folder unless it is in use. It loses its name first, as a process may be killed half-way."""
    held = lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if held is None:
        return False
    doomed = folder.with_name(f"{uuid.uuid4().hex}-0{PARTIAL}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    os.close(held)
    return True
