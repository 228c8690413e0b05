"""The steps as a Ray Data stream."""

import pyarrow as pa
import pytest
import ray

from pipeline.core.tables import SAMPLES
from pipeline.train.batches import Share, make_steps
from pipeline.train.feed import STEPS_A_TASK, stream_steps

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_stream_is_the_steps_in_their_order_from_any_step_on() -> None:
    made = [
        {"sample_id": "", "split": "train", "input_ids": [n, n, n], "completion_mask": [False] * 3, "learn_mask": [True] * 3}
        for n in range(50)
    ]
    rows = pa.Table.from_pylist(made, schema=SAMPLES)
    share = Share(4, seed=7, rank=1, workers=2, tokens=6)
    first, end = 5, 2 * STEPS_A_TASK + 9
    assert list(stream_steps(ray.put(rows), share, first, end)) == list(make_steps(rows, share, first, end))
    assert list(stream_steps(ray.put(rows), share, end, end)) == []
