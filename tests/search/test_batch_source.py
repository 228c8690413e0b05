"""The source of a search's stream."""

import subprocess
import sys

import pyarrow as pa
import pytest
import ray

from pipeline.search.batch_source import BatchSource


@pytest.mark.usefixtures("ray_session")
def test_it_gives_a_block_for_each_batch_until_there_are_no_more() -> None:
    class Giver:
        """In the dispatcher's place."""

        left = 3

        def next_batch(self) -> pa.Table | None:
            self.left -= 1
            return pa.table({"left": [self.left]}) if self.left >= 0 else None

    giver = ray.remote(Giver).options(num_cpus=0).remote()
    stream = ray.data.read_datasource(BatchSource(giver), override_num_blocks=1)
    blocks = stream.iter_batches(batch_size=None, batch_format="pyarrow")
    assert [left for block in blocks for left in block["left"].to_pylist()] == [2, 1, 0]


def test_the_process_that_reads_from_it_imports_nothing_that_engines_need() -> None:
    heavy = {"torch", "transformers", "peft", "vllm"}
    looked_for = f"import sys, pipeline.search.batch_source; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", looked_for], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
