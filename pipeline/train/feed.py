"""The training rows as a Ray Data stream: a worker's steps are made ahead of it, in the order of their numbers.

The tokenised split is put into Ray's object store once an arm, where all workers of a node share it (and Ray spills what does
not fit). A worker that starts anew streams from the step of its checkpoint on, so that no row comes twice and none is missed.
"""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from pipeline.train.batches import STEP, Share, make_steps

STEPS_A_TASK = 16


def stream_steps(rows: ray.ObjectRef, share: Share, first: int, end: int) -> Iterator[dict[str, Any]]:
    """The steps from `first` to before `end`, schema STEP.

    Args:
        rows: of the training split, schema SAMPLES.
    """
    if first >= end:
        return

    def made(numbers: pa.Table) -> pa.Table:
        start, count = numbers["item"][0].as_py(), len(numbers)
        return pa.Table.from_pylist(list(make_steps(ray.get(rows), share, start, start + count)), schema=STEP)

    # Nothing here takes a CPU of Ray's, as the training workers may hold all of them; one task at a time keeps the order.
    numbers = ray.data.from_items(list(range(first, end)), override_num_blocks=math.ceil((end - first) / STEPS_A_TASK))
    steps = numbers.map_batches(made, batch_size=None, batch_format="pyarrow", compute=TaskPoolStrategy(1), num_cpus=0)
    yield from steps.iter_rows()
