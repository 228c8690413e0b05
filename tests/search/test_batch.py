"""A batch of work on its way through Ray Data."""

import pyarrow as pa
import pytest

from pipeline.core.tables import SAMPLES
from pipeline.search.batch import Batch, candidates_table


@pytest.mark.parametrize("count", [3, 0])
def test_a_block_of_one_row_holds_a_batch_and_gives_it_back(count: int) -> None:
    candidates = candidates_table(["base", "a", "b"], [None, "s3://pool/a", "/pool/b"], ["base", "h", "g"])
    masks = [False, True]
    row = {"split": "search", "input_ids": [7, 8], "completion_mask": masks, "learn_mask": masks}
    samples = pa.Table.from_pylist([{"sample_id": f"s{n}", **row} for n in range(count)], schema=SAMPLES)
    batch = Batch(3, "number", "search", True, candidates, pa.concat_tables([samples.slice(0, 1), samples.slice(1)]))
    block = batch.to_block()
    assert len(block) == 1
    found = Batch.from_block(block)
    assert (found.race, found.number, found.stage, found.alone) == (3, "number", "search", True)
    assert found.candidates.equals(candidates)
    assert found.samples.equals(samples)
