"""The source of the stream of a search. It is a module of its own, as the process that reads from it imports no more than this:
what engines need takes seconds of a CPU, while the engine starts.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayActorError


class BatchSource(Datasource):
    """Gives what the dispatcher hands out, a block of one row each, until the stream is to end."""

    def __init__(self, dispatcher: Any) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task, which goes on for as long as the stream does."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_blocks, self._dispatcher), unknown)]


def _blocks(dispatcher: Any) -> Iterator[pa.Table]:
    with suppress(RayActorError):  # the driver took it away: all is over
        while (block := ray.get(dispatcher.next_batch.remote())) is not None:
            yield block
