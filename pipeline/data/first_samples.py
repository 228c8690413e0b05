"""The first usable rows of a target, tokenised without Ray: for who needs rows of its kind before the sample is drawn."""

from itertools import islice

import pyarrow as pa

from pipeline.config import Config
from pipeline.core.tables import SAMPLES
from pipeline.data.splits import first_usable, reading_of

TRIED = 64
"""Rows that are looked at."""


def first_samples(config: Config, count: int) -> pa.Table:
    """So many rows of target.train, or as many as can be used of the first TRIED; schema SAMPLES, of no split.

    Raises:
        InputError: as for `splits.draw_samples`.
    """
    return pa.Table.from_pylist([*islice(first_usable(config, reading_of(config), TRIED), count)], schema=SAMPLES)
