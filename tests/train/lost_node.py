"""An arm that trains on a node of its own, which is taken away; run by test_tune.py in a process of its own, as a process has one
cluster.

    python lost_node.py FOLDER BASE DATA none|node

The curve is written to FOLDER/<fault>.json.
"""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipeline.config import TrainConfig
from pipeline.core.storage import Folder
from pipeline.train import tune
from pipeline.train.arm import Arm, Job, Lora


def main() -> None:
    folder, base, data, fault = Path(sys.argv[1]), sys.argv[2], Folder.at(sys.argv[3]), sys.argv[4]
    # The head has too few CPUs for a training worker: the arm is steered there, and trained elsewhere.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def strike(said: str) -> None:
        print(said, flush=True)
        if fault == "node" and "step 4/" in said and len(nodes) == 1:
            cluster.remove_node(nodes[0], allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=2))

    train = TrainConfig(steps=8, evaluations=4, batch_size=4, learning_rates=(5e-3,), cpus_per_worker=2)
    job = Job(Arm("base", 5e-3, 0), base, Lora(4, 8.0, ("q_proj", "v_proj")), train, data, data, "key")
    (outcome,) = tune.train_arms([job], Folder.at(folder).sub(fault), strike, "run")
    found = {"curve": [{**row, "seconds": None} for row in outcome["curve"]], "nodes": len(nodes)}
    (folder / f"{fault}.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
