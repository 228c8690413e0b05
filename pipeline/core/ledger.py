"""What of a run is done, for which input, and how long it took: `<run>/stages.json`, and the same in `stages.backup.json`.

A stage is done for a key, the digest of everything that its result depends on. The same key again: its result is kept.
Another key: what it left is removed and it runs anew, and the stages after it are open again. Seconds add up over the
attempts of one key, so that a run which was interrupted is honest about its cost; of an attempt that is killed, what passed
since its last `beat` is lost. `spans` are the attempts themselves, each from when to when in seconds since 1970: what ran after
what, and with how long a break.

Where the one file cannot be read, as a disk or a person damaged it, the other is used. A stage counts as done only if its output
files are there, whole. Both files are written before the results of a stage are removed, so that neither names those of another
input.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.core.storage import Folder

FILE = "stages.json"
BACKUP = "stages.backup.json"
BEAT = 2.0
"""Seconds between two writes of the time spent."""
CHECKED_AT_ONCE = 16
"""Files of a stage that are looked into side by side."""


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
    many seconds the running stage has taken, `say` what a person should know. `check` raises where this process may not write
    any more."""

    def __init__(
        self,
        run: Folder,
        stages: Mapping[str, Outputs],
        tell: Callable[[str, float], None] = lambda stage, seconds: None,
        say: Callable[[str], None] = lambda text: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._stages, self._tell, self._check = run, stages, tell, check
        self.records = _read(run, say)
        self._running: tuple[str, float, float] | None = None
        self._written = 0.0

    def done(self, stage: str, key: str | None = None) -> bool:
        """Whether a stage is done and what it left is there, whole; with a key, whether for that key."""
        record = self.records.get(stage, {})
        if not record.get("done") or (key is not None and record["key"] != key):
            return False
        with ThreadPoolExecutor(CHECKED_AT_ONCE) as threads:  # a table may have hundreds of parts
            return all(threads.map(self._run.is_complete, record.get("files", ())))

    @property
    def running(self) -> str | None:
        """The stage that is being performed."""
        return self._running and self._running[0]

    def key(self, stage: str) -> str:
        return str(self.records[stage]["key"])

    def seconds(self, stage: str) -> float:
        return float(self.records.get(stage, {}).get("seconds", 0.0))

    def note(self, name: str, seconds: float) -> None:
        """Add time that was spent outside of the stages, and ends now."""
        spans = [*self.records.get(name, {}).get("spans", ()), [_now() - round(seconds, 2), _now()]]
        spent = self.seconds(name) + seconds
        self.records[name] = {"key": "", "done": True, "seconds": spent, "details": {}, "spans": spans}
        self._save()

    @contextmanager
    def perform(self, stage: str, key: str) -> Iterator[dict[str, Any]]:
        """Time an attempt at a stage and mark it done unless it raises. Yields the stage's details, to be filled in."""
        record = self.records.get(stage)
        outdated = self._reopen_from(stage)
        if record is None or record["key"] != key:
            outdated += self._stages[stage].work
            record = {"key": key, "done": False, "seconds": 0.0, "details": {}}
        if self.records:  # a new run has nothing to take back
            self._save()
        for name in outdated:
            self._run.delete(name)
        # Only now: who is killed before has removed a part, and what is left must not pass for work on this key.
        self.records[stage] = record
        record.setdefault("spans", []).append([_now(), _now()])
        self._running = (stage, time.perf_counter(), record["seconds"])
        self._save()
        try:
            yield record["details"]
            record["files"] = [file for name in self._stages[stage].results for file in self._run.checked_files(name)]
            record["done"] = True
        finally:
            self.beat(force=True)
            self._back_up()
            self._running = None

    def beat(self, force: bool = False) -> None:
        """Put down the time that the running stage has taken so far."""
        if self._running is None or (not force and time.perf_counter() - self._written < BEAT):
            return
        stage, started, before = self._running
        seconds = self.records[stage]["seconds"] = before + time.perf_counter() - started
        self.records[stage]["spans"][-1][1] = _now()
        self._write()
        self._tell(stage, seconds)

    def _reopen_from(self, stage: str) -> list[str]:
        """This stage and those after it are not done any more. Gives the names of their results, which a reader must not take for
        results of this input."""
        order = list(self._stages)
        later = order[order.index(stage) :]
        for record in (self.records[name] for name in later if name in self.records):
            record["done"] = False
        return [result for name in later for result in self._stages[name].results]

    def _save(self) -> None:
        self._write()
        self._back_up()

    def _write(self) -> None:
        self._check()
        self._written = time.perf_counter()
        self._run.write_json(FILE, self.records)

    def _back_up(self) -> None:
        self._run.write_json(BACKUP, self.records)


def _now() -> float:
    return round(time.time(), 2)


def _read(run: Folder, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The records of earlier attempts, from the first of the two files that can be read."""
    problems: dict[str, str] = {}
    for name in (FILE, BACKUP):
        try:
            found = run.read_json(name)
        except FileNotFoundError:
            problems[name] = "is missing"
        except ValueError:
            problems[name] = "is no valid JSON"
        else:
            if _are_records(found):
                if problems:
                    say(f"{FILE} {problems[FILE]}; {BACKUP} is used in its place")
                return dict(found)
            problems[name] = "holds no records of stages"
    if set(problems.values()) != {"is missing"}:  # a new run
        what = ", ".join(f"{name} {problem}" for name, problem in problems.items())
        say(f"{what}; what is done is not known: all stages are done again, with the scores of the store")
    return {}


def _are_records(found: Any) -> bool:
    """Whether a document is one that a ledger wrote."""
    needed = {"key", "done", "seconds"}
    if not found or not isinstance(found, dict):
        return False
    return all(isinstance(one, dict) and needed <= one.keys() for one in found.values())
