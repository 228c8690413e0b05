"""A search on a local cluster of three nodes, run by test_faults.py in a process of its own, as a process has one cluster.

    python three_nodes.py FOLDER BASE none|node|join

`node` takes a node away, `join` begins with one node and adds the others.
What the search found is written to FOLDER/<fault>/found.json.
"""

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipeline.adapters.adapter import hash_of
from pipeline.config import SearchConfig
from pipeline.core.storage import Folder
from pipeline.search import engine_pool
from pipeline.search.batch import candidates_table
from pipeline.search.race import Schedule
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import Work

SCHEDULE = Schedule(rungs=(2, 4, 6), budget=25 * 2 + 14 * 2 + 9 * 2, confidence=0.99)


def work_in(folder: Path) -> Work:
    """The adapters and samples that the test left in `folder`; the scores of this run have a place of their own."""
    names = sorted(path.name for path in (folder / "pool").iterdir())
    folders = [folder / "pool" / name for name in names]
    columns = [["base", *names], [None, *map(str, folders)], ["base", *map(hash_of, folders)]]
    candidates = candidates_table(*columns)
    run = Folder.at(folder).sub(sys.argv[3])
    store = ScoreStore.at(run.sub("store").uri, "base", "transformers", "float32")
    return Work(candidates, Folder.at(folder).read_table("samples.parquet"), store, run.sub("failures"))


class Waiting(engine_pool.ScoringActor):
    """Leaves the pool the time to grow, however slow the machine is: does two batches, and goes on once another engine is up."""

    batches = 0

    def __call__(self, block: pa.Table) -> pa.Table:
        self.batches += 1
        while self.batches > 2 and ray.get(self.dispatcher.progress.remote([1]))[0].engines < 2:
            time.sleep(0.5)
        return super().__call__(block)


class Slow(engine_pool.ScoringActor):
    """Takes so long over a batch that the race is seen in its midst, however fast the machine is."""

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(1)
        return super().__call__(block)


STRUCK = {"node": Slow, "join": Waiting}


def main() -> None:
    folder, base, fault = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [] if fault == "join" else [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    work = work_in(folder)
    search = SearchConfig(engine="transformers", dtype="float32", adapters_per_batch=2, cpus_per_actor=1)
    if fault in STRUCK:
        engine_pool.ScoringActor = STRUCK[fault]  # type: ignore[misc]
    done = False
    engine = engine_pool.engine_config(base, 4, ["q_proj", "v_proj"], search, max_tokens=64)
    for progress in engine_pool.score_stream(work, engine, search, SCHEDULE):
        if done or not 4 <= progress.adapter_samples < 50:
            continue
        done = True
        if fault == "node":
            cluster.remove_node(nodes[0], allow_graceful=False)
        elif fault == "join":
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    rows = pa.concat_tables([work.store.folder.read_table(name) for name in work.store.folder.list_files(".parquet")])
    known = work.store.load(work.candidates["adapter_hash"].to_pylist(), work.samples)
    found = {"seen": progress.seen, "nll": known.nll_NS.tolist(), "rows": len(rows), "engines": progress.engines, "struck": done}
    (folder / fault / "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
