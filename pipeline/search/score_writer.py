"""The way of a race's scores into the store: behind the race, which never waits for it.

    writer = ScoreWriter(store, hashes, failures)
    writer.add(scores, {})  # back at once
    writer.flush(60)        # until all of it is written

One thread writes about a file a second, of whatever engines have reported since: what a killed process loses of that, and scores
again, is a second's work. What may pass of the store's errors is tried again for as long as the race goes on.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from pipeline.core.errors import is_transient, one_line
from pipeline.core.storage import Folder
from pipeline.search.score_store import ScoreStore, new_name, record_failures

PERIOD = 1.0
"""Seconds between two files."""

PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between two attempts at a file; then the last again and again."""


class _Waiting(NamedTuple):
    """What has been added and is not written yet."""

    scores: list[pa.Table]
    failures: dict[str, str]

    @property
    def empty(self) -> bool:
        return not (self.scores or self.failures)


class ScoreWriter:
    """Writes scores, and why adapters were set aside, in a thread of its own."""

    def __init__(self, store: ScoreStore, hashes: Mapping[str, str], failures: Folder) -> None:
        """
        Args:
            hashes: adapter_id -> adapter_hash of whoever may have scores.
            failures: where it is kept why adapters were set aside.
        """
        self.written = 0
        """Scores that are in the store for good."""
        self.files: set[str] = set()
        """Names of the files that were written, or are about to be."""
        self._store, self._hashes, self._failures = store, hashes, failures
        self._waiting, self._under_way = _Waiting([], {}), False
        self._error: Exception | None = None
        self._closed = self._hurry = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="scores").start()

    def add(self, scores: pa.Table, failures: dict[str, str]) -> None:
        """Take scores of schema SCORES, and reasons by adapter_id.

        Raises:
            Exception: as `require_sound`.
        """
        with self._changed:
            self.require_sound()
            if len(scores):
                self._waiting.scores.append(scores)
            self._waiting.failures.update(failures)
            self._changed.notify_all()

    def flush(self, patience: float) -> None:
        """Wait until all is written.

        Args:
            patience: seconds after which an error that may pass is raised.

        Raises:
            Exception: it cannot be written.
        """
        deadline = time.monotonic() + patience
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while not (self._waiting.empty and not self._under_way):
                self.require_sound()
                if self._error and time.monotonic() > deadline:
                    raise self._error
                self._changed.wait(timeout=0.5)
            self._hurry = False

    def require_sound(self) -> None:
        """
        Raises:
            Exception: what was added cannot be written, and never will be.
        """
        if self._error and self._is_for_good():
            raise self._error

    def close(self) -> None:
        """End the thread; what it has not written is let go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        attempts = 0
        while (batch := self._next()) is not None:
            try:
                self._write(batch)
            except Exception as error:  # whoever adds or flushes gets it
                self._put_back(batch, error)
                pause = PAUSES[min(attempts, len(PAUSES) - 1)]
                attempts += 1
            else:
                attempts, pause = 0, PERIOD
            self._rest(pause, attempts > 0)

    def _next(self) -> _Waiting | None:
        """What is to be written now; None: the writer is closed, or gave up."""
        with self._changed:
            while self._waiting.empty and not self._closed:
                self._changed.wait()
            if self._closed or self._is_for_good():
                return None
            batch, self._waiting, self._under_way = self._waiting, _Waiting([], {}), True
            return batch

    def _write(self, batch: _Waiting) -> None:
        if batch.scores:
            scores = pa.concat_tables(batch.scores)
            self.files.add(name := new_name())  # before it is there: whoever lists the store meanwhile need not read it
            self._store.write(scores, self._hashes, name)
            batch.scores.clear()  # else they were written again with the failures
            self.written += len(scores)
        record_failures(self._failures, batch.failures)
        with self._changed:
            self._under_way, self._error = False, None
            self._changed.notify_all()

    def _put_back(self, batch: _Waiting, error: Exception) -> None:
        logging.getLogger(__name__).warning("scores could not be written: %s", one_line(error))
        with self._changed:
            self._waiting.scores[:0] = batch.scores
            self._waiting = _Waiting(self._waiting.scores, batch.failures | self._waiting.failures)
            self._under_way, self._error = False, error
            self._changed.notify_all()

    def _rest(self, seconds: float, failed: bool) -> None:
        """Let scores gather; not where somebody waits for them, but always after an error."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._closed and (failed or not self._hurry) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(timeout=left)

    def _is_for_good(self) -> bool:
        return self._error is not None and not is_transient(self._error)
