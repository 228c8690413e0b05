"""What of a run is done, for which input, and how long it took: `<run>/stages.json`.

A stage is done for a key, the digest of everything that its result depends on. The same key again: its result is kept.
Another key: its old outputs are removed and it runs anew. Seconds add up over the attempts of one key, so that a run which was
interrupted is honest about its cost; of an attempt that is killed, what passed since its last `beat` is lost.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.storage import Folder

FILE = "stages.json"
BEAT = 2.0
"""Seconds between two writes of the time spent."""


def digest(*parts: Any) -> str:
    """A short digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """The stages of one run folder."""

    def __init__(self, run: Folder):
        self._run = run
        self.records: dict[str, dict[str, Any]] = run.read_json(FILE) if run.exists(FILE) else {}
        self._running: tuple[str, float, float] | None = None
        self._written = 0.0

    def done(self, stage: str, key: str | None = None) -> bool:
        """Whether a stage is done; with a key, whether for that key."""
        record = self.records.get(stage, {})
        return bool(record.get("done")) and (key is None or record["key"] == key)

    def key(self, stage: str) -> str:
        return str(self.records[stage]["key"])

    def seconds(self, stage: str) -> float:
        return float(self.records.get(stage, {}).get("seconds", 0.0))

    @contextmanager
    def perform(self, stage: str, key: str, outputs: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Time an attempt at a stage and mark it done unless it raises. Yields the stage's details, to be filled in.

        Args:
            outputs: names in the run folder that an attempt for another key left, and that are removed.
        """
        record = self.records.get(stage)
        if record is None or record["key"] != key:
            for name in outputs:
                self._run.delete(name)
            record = {"key": key, "done": False, "seconds": 0.0, "details": {}}
        self.records[stage] = record | {"done": False}
        record = self.records[stage]
        self._running = (stage, time.perf_counter(), record["seconds"])
        self._write()
        try:
            yield record["details"]
            record["done"] = True
        finally:
            self.beat(force=True)
            self._running = None

    def beat(self, force: bool = False) -> None:
        """Put down the time that the running stage has taken so far."""
        if self._running is None or (not force and time.perf_counter() - self._written < BEAT):
            return
        stage, started, before = self._running
        self.records[stage]["seconds"] = before + time.perf_counter() - started
        self._write()

    def _write(self) -> None:
        self._written = time.perf_counter()
        self._run.write_json(FILE, self.records)
