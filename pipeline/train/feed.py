"""The steps of a training worker, made ahead of it from rows on its node's disk.

A step's rows lie anywhere in the training split. So each row group that holds rows of an arm's steps is read once, ahead of
them, and the rows are written to an Arrow file without compression, which is mapped into memory, not loaded. The workers of a
node share the file, those of all arms with the same seed, and the last one removes it.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.core import node_folder
from pipeline.core.ledger import digest
from pipeline.core.parts import Parts
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.train.arm import Job
from pipeline.train.batches import Share, make_step, row_numbers

AHEAD = 4
"""Steps that are made while the worker is at an earlier one."""

BATCH_ROWS = 1024
"""Of the Arrow file: where a row is, is arithmetic."""

COLUMNS = pa.schema([SAMPLES.field("input_ids"), SAMPLES.field("learn_mask")])
ROWS_FILE, ORDER_FILE = "rows.arrow", "order.npy"


class StepFeed:
    """Gives an arm's steps, schema `batches.STEP`, from any on. Its rows begin to come when it is made."""

    def __init__(self, job: Job) -> None:
        steps = job.last_step or job.train.steps
        threads = ThreadPoolExecutor(1)
        self._rows: Future[NodeRows] = threads.submit(NodeRows, job.data, steps, job.train.batch_size, job.arm.seed)
        threads.shutdown(wait=False)

    def __call__(self, share: Share, first: int, end: int) -> Iterator[dict[str, Any]]:
        rows = self._rows.result()
        return made_ahead(lambda number: make_step(rows.of_step(number), number, share), range(first, end))


class NodeRows:
    """The rows of all steps of an arm, on this node's disk for as long as somebody has this."""

    def __init__(self, data: Folder, steps: int, batch_size: int, seed: int, folder: Path | None = None) -> None:
        """
        Args:
            data: of the training splits.
            folder: where they are kept; by default one of this user's in the machine's temporary folder.
        """
        shared = node_folder.private(folder, "rows")
        node_folder.remove_unused(shared)
        entry = shared / digest(data.uri, data.sub("train.parquet").state(), steps, batch_size, seed)

        def write(target: Path) -> None:
            table = Parts(data, "train.parquet")
            write_rows(table, row_numbers(0, steps, batch_size, len(table), seed), target)

        held = node_folder.obtain(entry, write)
        weakref.finalize(self, _give_up, held, entry)
        self._batch_size = batch_size
        self._order = np.load(entry / ORDER_FILE, mmap_mode="r")
        self._file = ipc.open_file(pa.memory_map(str(entry / ROWS_FILE)))

    def of_step(self, number: int) -> pa.Table:
        """The rows of a step's global batch, in its order."""
        rows = self._order[number * self._batch_size : (number + 1) * self._batch_size].tolist()
        batches = (self._file.get_batch(row // BATCH_ROWS).slice(row % BATCH_ROWS, 1) for row in rows)
        return pa.Table.from_batches(list(batches), COLUMNS)


def write_rows(table: Parts, numbers: np.ndarray, target: Path) -> None:
    """Put down the rows of these numbers, each once, and where in the file each of the numbers is."""
    wanted = np.unique(numbers)
    target.mkdir()
    np.save(target / ORDER_FILE, np.searchsorted(wanted, numbers))
    with pa.OSFile(str(target / ROWS_FILE), "wb") as sink, ipc.new_file(sink, COLUMNS) as writer:
        for batch in _in_batches(table.take(wanted, COLUMNS.names)):
            writer.write_table(batch.cast(COLUMNS).combine_chunks())


def made_ahead(make: Callable[[int], dict[str, Any]], numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """What `make` gives for each number, in order; up to AHEAD more are made meanwhile, in a thread."""
    coming: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for number in numbers:
            coming.append(thread.submit(make, number))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _in_batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, BATCH_ROWS at a time."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= BATCH_ROWS:
            *full, rest = _cut(waiting)
            yield from full
            waiting = [rest]
    yield from _cut(waiting) if waiting else ()


def _cut(tables: Sequence[pa.Table]) -> list[pa.Table]:
    rows = pa.concat_tables(tables)
    return [rows.slice(start, BATCH_ROWS) for start in range(0, len(rows), BATCH_ROWS)]


def _give_up(held: int, entry: Path) -> None:
    os.close(held)
    node_folder.remove(entry)
