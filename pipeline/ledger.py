"""What of a run is done, for which input, and how long it took: `<run>/stages.json`.

A stage is done for a key, the digest of everything that its result depends on. The same key again: its result is kept.
Another key: what it left is removed and it runs anew, and the stages after it are open again. Seconds add up over the
attempts of one key, so that a run which was interrupted is honest about its cost; of an attempt that is killed, what passed
since its last `beat` is lost.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.storage import Folder

FILE = "stages.json"
BEAT = 2.0
"""Seconds between two writes of the time spent."""


def digest(*parts: Any) -> str:
    """A short digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outputs:
    """Names in the run folder: the results that others read, and the work that an unfinished attempt can go on with."""

    results: Sequence[str]
    work: Sequence[str] = ()


class Ledger:
    """The stages of one run folder; `stages` are their outputs, in the order in which they run. `tell` hears now and then how
    many seconds the running stage has taken."""

    def __init__(
        self, run: Folder, stages: Mapping[str, Outputs], tell: Callable[[str, float], None] = lambda stage, seconds: None
    ):
        self._run, self._stages, self._tell = run, stages, tell
        found = run.read_json(FILE) if run.is_whole(FILE) else {}
        self.records: dict[str, dict[str, Any]] = found if isinstance(found, dict) else {}
        self._running: tuple[str, float, float] | None = None
        self._written = 0.0

    def done(self, stage: str, key: str | None = None) -> bool:
        """Whether a stage is done and what it left is there, whole; with a key, whether for that key."""
        record = self.records.get(stage, {})
        if not record.get("done") or (key is not None and record["key"] != key):
            return False
        return all(map(self._run.is_whole, record.get("files", ())))

    @property
    def running(self) -> str | None:
        """The stage that is being performed."""
        return self._running and self._running[0]

    def key(self, stage: str) -> str:
        return str(self.records[stage]["key"])

    def seconds(self, stage: str) -> float:
        return float(self.records.get(stage, {}).get("seconds", 0.0))

    def note(self, name: str, seconds: float) -> None:
        """Add time that was spent outside of the stages."""
        self.records[name] = {"key": "", "done": True, "seconds": self.seconds(name) + seconds, "details": {}}
        self._write()

    @contextmanager
    def perform(self, stage: str, key: str) -> Iterator[dict[str, Any]]:
        """Time an attempt at a stage and mark it done unless it raises. Yields the stage's details, to be filled in."""
        record = self.records.get(stage)
        if record is None or record["key"] != key:
            self._remove(self._stages[stage].work)
            record = {"key": key, "done": False, "seconds": 0.0, "details": {}}
        self._reopen_from(stage)
        self.records[stage] = record | {"done": False}
        record = self.records[stage]
        self._running = (stage, time.perf_counter(), record["seconds"])
        self._write()
        try:
            yield record["details"]
            record["files"] = [file for name in self._stages[stage].results for file in self._run.checked_files(name)]
            record["done"] = True
        finally:
            self.beat(force=True)
            self._running = None

    def beat(self, force: bool = False) -> None:
        """Put down the time that the running stage has taken so far."""
        if self._running is None or (not force and time.perf_counter() - self._written < BEAT):
            return
        stage, started, before = self._running
        seconds = self.records[stage]["seconds"] = before + time.perf_counter() - started
        self._write()
        self._tell(stage, seconds)

    def _reopen_from(self, stage: str) -> None:
        """Remove the results of this stage and of those after it: a reader must not take them for results of this input."""
        order = list(self._stages)
        for later in order[order.index(stage) :]:
            self._remove(self._stages[later].results)
            if later in self.records:
                self.records[later]["done"] = False

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._run.delete(name)

    def _write(self) -> None:
        self._written = time.perf_counter()
        self._run.write_json(FILE, self.records)
