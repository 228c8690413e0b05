"""One process at a time, on a local folder or an object store: `with Lock(folder) as lock: ...`.

pyarrow writes to an object store without conditions, so this is Lamport's bakery (A new solution of Dijkstra's concurrent
programming problem, Communications of the ACM 17 (8), 1974), which needs nothing but writes and listings that all see at once,
as local disks, S3 and Google Cloud Storage give. A process that wants the lock writes `choosing.<id>`, takes a number above
all that it sees (`number.<n>.<id>`), waits until no other is choosing, and looks again: the smallest number holds the lock.
Unlike in the bakery, the others do not wait for their turn but give up. No file that a listing has to find is ever written
twice.

The holder writes `beat.<id>` anew every quarter of the expiry, as long as its work gets on; after DEADLINE without progress it
stops. Where a beat is older than the expiry, by the store's own clock, its process is dead, asleep or hangs, and the others
remove what it left; at once where it was a process of this machine and is gone. A holder that slept that long and wakes finds
its number gone: `check` raises, and is to be called before anything that only the holder may do. If no other came meanwhile,
it still holds the lock.

Whether a process on another machine is dead cannot be seen before its beat is too old. A lock with a `say` waits for that, and
gives up once another beat comes: so a job that is started again on another node, as its own was taken away, goes on by itself.
"""

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NoReturn

from pipeline.core.processes import is_gone, may_be_seen, this_process
from pipeline.core.progress import got_on, standstill
from pipeline.core.storage import Folder

EXPIRY = 120.0
"""Seconds after which a process that gives no sign of life has lost the lock."""

DEADLINE = 6 * 3600.0
"""Seconds without progress after which a process gives no sign of life any more. The longest silence of work that gets on is that
between two evaluations of a large training; a batch of scores or a compilation takes minutes."""

POLL = 0.1
"""Seconds between two looks at those who are choosing a number."""


class LockTakenError(RuntimeError):
    """Another process holds the lock."""


class LockLostError(RuntimeError):
    """This process gave no sign of life for so long that others may hold the lock now."""


@dataclass(frozen=True)
class Held:
    """To be called, in whichever process, before anything that only the holder of a lock may do.

    Raises:
        LockLostError: it is not held any more.
    """

    folder: Folder
    mark: str
    expiry: float

    def __call__(self) -> None:
        if not self.folder.exists(self.mark):
            raise LockLostError(
                f"{self.folder.uri}: this process gave no sign of life for {self.expiry:g} s and lost the lock; "
                "another one may be at work here now"
            )


def nobody_else() -> None:
    """In place of `Held` where no other process can be at work, as in a temporary folder."""


class Lock:
    """A lock in a folder of its own, made where it is missing.

    Args:
        say: hears how long it is waited for a process that may be dead; without it nobody is waited for.

    Raises:
        LockTakenError: on entering, where another process holds it; the message says which.
        LockLostError: on entering or by `check`, where this process slept for longer than `expiry` seconds.
    """

    def __init__(self, folder: Folder, expiry: float = EXPIRY, say: Callable[[str], None] | None = None) -> None:
        self.folder, self.expiry, self._say = folder, expiry, say
        self._id, self._number = uuid.uuid4().hex, ""
        self._waited_for = dict[str, float | None]()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> "Lock":
        got_on()
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
        self.held()

    @property
    def held(self) -> Held:
        return Held(self.folder, self._number, self.expiry)

    def _take(self) -> None:
        about = {**this_process(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
        choosing = f"choosing.{self._id}"
        self.folder.write_json(choosing, about)
        last = max((_number(name) for name in self._entries("number")), default=0)
        self._number = f"number.{last + 1:09d}.{self._id}"
        self.folder.write_json(self._number, about)
        Held(self.folder, choosing, self.expiry)()  # removed: others did not wait for this number, which may be below theirs
        self.folder.delete(choosing)
        while self._entries("choosing"):
            time.sleep(POLL)
        # A new listing: one whose choice the last one did not show any more may not have shown its number yet.
        while (first := min([*self._entries("number"), self._number])) != self._number:
            self._wait_for(first)
        self.check()

    def _entries(self, kind: str) -> list[str]:
        """The files of one kind of the living; what the dead left is removed."""
        names = self.folder.list_files()
        now = self._now()
        alive = {owner for owner in {_owner(name) for name in names} if self._is_alive(owner, names, now)}
        for name in reversed(names):  # numbers first, beats last: no number is left behind that nobody beats for
            if _owner(name) not in alive:
                self.folder.delete(name)
        return [name for name in names if name.startswith(f"{kind}.") and _owner(name) in alive]

    def _now(self) -> float:
        """By the store's clock."""
        self._beat()
        return self.folder.modified(f"beat.{self._id}") or 0.0

    def _is_alive(self, owner: str, names: list[str], now: float) -> bool:
        beat = self.folder.modified(f"beat.{owner}")
        if beat is None or now - beat > self.expiry:
            return False
        marks = [name for name in names if _owner(name) == owner and not name.startswith("beat.")]
        return owner == self._id or not any(is_gone(self._read(name)) for name in marks)

    def _wait_for(self, first: str) -> None:
        """Let some time pass where who is first may be dead.

        Raises:
            LockTakenError: it lives.
        """
        about, beat = self._read(first), self.folder.modified(f"beat.{_owner(first)}")
        if self._say is None or may_be_seen(about) or self._waited_for.get(first, beat) not in (beat, None):
            self._give_up(about)
        if first not in self._waited_for and about and beat is not None:
            seconds = self.expiry - (self._now() - beat)
            self._say(f"{_who(about)} worked here, and may be dead: waiting {seconds:.0f} s for a sign of life")
        self._waited_for[first] = beat
        time.sleep(self.expiry / 60)

    def _read(self, name: str) -> dict[str, Any]:
        """What a process put down of itself; nothing where it ended just now, or is being removed."""
        with suppress(OSError, ValueError):
            return dict(self.folder.read_json(name))
        return {}

    def _give_up(self, about: dict[str, Any]) -> NoReturn:
        who = f"since {about['since']} ({_who(about)})" if about else "until a moment ago"
        raise LockTakenError(f"{self.folder.uri}: another process is at work here {who}; try again when it has ended, or end it")

    def _beat(self) -> None:
        self.folder.write_text(f"beat.{self._id}", "")

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.expiry / 4):
            if standstill() < DEADLINE:
                with suppress(OSError):  # the next one may come through
                    self._beat()

    def _leave(self) -> None:
        self._ended.set()
        self._beats.join()
        with suppress(OSError):  # what stays expires
            for name in filter(None, (self._number, f"choosing.{self._id}", f"beat.{self._id}")):
                self.folder.delete(name)


def _owner(name: str) -> str:
    return name.rpartition(".")[2]


def _number(name: str) -> int:
    return int(name.split(".")[1])


def _who(about: dict[str, Any]) -> str:
    return f"process {about['process']} on {about['host']}"
