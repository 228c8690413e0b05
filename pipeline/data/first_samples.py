"""The first usable rows of a target, tokenised without Ray: for who needs rows of its kind before the sample is drawn."""

from itertools import islice

import pyarrow as pa

from pipeline.config import Config
from pipeline.core.tables import SAMPLES
from pipeline.data.readers import first_rows
from pipeline.data.splits import reading_of, target_paths
from pipeline.data.tokenise import tokenise_text
from pipeline.model.base_model import load_tokenizer

TRIED = 64
"""Rows that are looked at."""


def first_samples(config: Config, count: int) -> pa.Table:
    """So many rows of target.train, or as many as can be used of the first TRIED; schema SAMPLES, of no split.

    Raises:
        InputError: as for `splits.draw_samples`.
    """
    tokenizer, reading = load_tokenizer(config.base), reading_of(config)
    texts = islice(first_rows(target_paths(config)["train"], "train", list(reading.columns.values())), TRIED)
    rows = (tokenise_text(text, tokenizer, config.search.seed, reading) for text in texts)
    return pa.Table.from_pylist([*islice((row for row in rows if "problem" not in row), count)], schema=SAMPLES)
