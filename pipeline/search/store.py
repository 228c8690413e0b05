"""The score files of a run: what is known, and what is still to be scored."""

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from pipeline.storage import Folder
from pipeline.tables import SCORES, SCORING_FAILURES

FAILURES = "failures"
"""Sub-folder with the adapters that an engine could not score."""


class ScoreFiles:
    """A folder of Parquet files of schema SCORES, each written whole, one for every batch of adapters."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def write(self, scores: pa.Table, failures: dict[str, str]) -> None:
        if failures:
            rows = pa.table([list(failures), list(failures.values())], schema=SCORING_FAILURES)
            self.folder.write_table(f"{FAILURES}/{uuid.uuid4().hex}.parquet", rows)
        if len(scores):
            self.folder.write_table(f"{uuid.uuid4().hex}.parquet", scores)

    def scores(self) -> pads.Dataset:
        return self.folder.dataset(SCORES)

    def failures(self) -> dict[str, str]:
        """adapter_id -> why its scoring failed."""
        table = self.folder.sub(FAILURES).dataset(SCORING_FAILURES).to_table()
        return dict(zip(*(table[name].to_pylist() for name in SCORING_FAILURES.names), strict=True))

    def forget_failures(self) -> None:
        self.folder.delete(FAILURES)

    def missing(self, adapters: pa.Table, n_samples: int) -> pa.Table:
        """The rows of `adapters` without a full set of scores and without a failure on record."""
        counts = self.scores().to_table(["adapter_id"])["adapter_id"].value_counts().to_pylist()
        done = {row["values"] for row in counts if row["counts"] >= n_samples} | set(self.failures())
        return adapters.filter(pc.invert(pc.is_in(adapters["adapter_id"], pa.array(sorted(done), pa.string()))))

    def of_adapter(self, adapter_id: str, sample_ids: list[str]) -> dict[str, np.ndarray]:
        """nll_sum, n_tokens and n_correct of one adapter, in the order of `sample_ids`."""
        table = self.scores().to_table(filter=pc.field("adapter_id") == adapter_id)
        return aligned(table, sample_ids)


def aligned(scores: pa.Table, sample_ids: list[str]) -> dict[str, np.ndarray]:
    """One adapter's score columns as float arrays of shape (samples,), in the order of `sample_ids`.

    Raises:
        KeyError: a sample has no score.
    """
    place = {sample: row for row, sample in enumerate(scores["sample_id"].to_pylist())}
    rows = [place[sample] for sample in sample_ids]
    return {name: scores[name].to_numpy().astype(np.float64)[rows] for name in SCORES.names[2:]}
