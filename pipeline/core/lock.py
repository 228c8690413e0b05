"""One process at a time, on a local folder or an object store: `with Lock(folder) as lock: ...`.

pyarrow writes to an object store without conditions, so this is Lamport's bakery (A new solution of Dijkstra's concurrent
programming problem, Communications of the ACM 17 (8), 1974), which needs nothing but writes and listings that all see at once, as
local disks, S3 and Google Cloud Storage give. Who comes says so (`choosing.<id>`), takes a number above all that it sees
(`number.<n>.<id>`), waits until nobody is choosing, and looks again: the smallest number holds the lock. Unlike in the bakery,
the others do not wait for their turn but give up. No file that a listing has to find is ever written twice.

`beat.<id>` is written anew every quarter of the expiry. Where it is older than the expiry, by the store's own clock, its process
is dead or asleep, and the others remove what it left. Who slept that long and wakes finds its number gone: `check` raises, and is
to be called before anything that only the holder may do.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NoReturn

from pipeline.core.storage import Folder

EXPIRY = 120.0
"""Seconds after which a process that gives no sign of life has lost the lock."""

POLL = 0.1
"""Seconds between two looks at those who are choosing a number."""


class LockTakenError(RuntimeError):
    """Another process holds the lock."""


class LockLostError(RuntimeError):
    """This process gave no sign of life for so long that others may hold the lock now."""


class Lock:
    """A lock in a folder of its own, made where it is missing.

    Raises:
        LockTakenError: on entering, where another process holds it; the message says which.
        LockLostError: on entering or by `check`, where this process slept for longer than `expiry` seconds.
    """

    def __init__(self, folder: Folder, expiry: float = EXPIRY) -> None:
        self.folder, self.expiry = folder, expiry
        self._id, self._number = uuid.uuid4().hex, ""
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> "Lock":
        self._beat()
        self._beats.start()
        try:
            self._take()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def check(self) -> None:
        """Make sure that the lock is still held.

        Raises:
            LockLostError: it is not.
        """
        if not self.folder.exists(self._number):
            self._lost()

    def _take(self) -> None:
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
        choosing = f"choosing.{self._id}"
        self.folder.write_json(choosing, about)
        last = max((_number(name) for name in self._entries("number")), default=0)
        self._number = f"number.{last + 1:09d}.{self._id}"
        self.folder.write_json(self._number, about)
        if not self.folder.exists(choosing):  # removed: others did not wait for this number, which may be below theirs
            self._lost()
        self.folder.delete(choosing)
        while self._entries("choosing"):
            time.sleep(POLL)
        # A new listing: one whose choice the last one did not show any more may not have shown its number yet.
        first = min([*self._entries("number"), self._number])
        if first != self._number:
            self._give_up(first)
        self.check()

    def _entries(self, kind: str) -> list[str]:
        """The files of one kind of the living; what the dead left is removed."""
        names = self.folder.list_files()
        self._beat()
        now = self.folder.modified(f"beat.{self._id}") or 0.0
        beats = {owner: self.folder.modified(f"beat.{owner}") for owner in {_owner(name) for name in names}}
        alive = {owner for owner, beat in beats.items() if beat is not None and now - beat <= self.expiry}
        for name in reversed(names):  # numbers first, beats last: no number is left behind that nobody beats for
            if _owner(name) not in alive:
                self.folder.delete(name)
        return [name for name in names if name.startswith(f"{kind}.") and _owner(name) in alive]

    def _give_up(self, holder: str) -> NoReturn:
        about: dict[str, Any] = {}
        with suppress(OSError):  # it ended just now, or is being removed
            about = self.folder.read_json(holder)
        who = "since {since} (process {process} on {host})".format_map(about) if about else "until a moment ago"
        raise LockTakenError(f"{self.folder.uri}: another process is at work here {who}; try again when it has ended")

    def _lost(self) -> NoReturn:
        raise LockLostError(
            f"{self.folder.uri}: this process gave no sign of life for {self.expiry:g} s and lost the lock; "
            "another one may be at work here now"
        )

    def _beat(self) -> None:
        self.folder.write_text(f"beat.{self._id}", "")

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.expiry / 4):
            with suppress(OSError):  # the next one may come through
                self._beat()

    def _leave(self) -> None:
        self._ended.set()
        self._beats.join()
        for name in (self._number, f"choosing.{self._id}", f"beat.{self._id}"):
            if name:
                self.folder.delete(name)


def _owner(name: str) -> str:
    return name.rpartition(".")[2]


def _number(name: str) -> int:
    return int(name.split(".")[1])
