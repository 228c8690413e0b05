"""One arm under Ray Train: DDP over gloo on CPUs, NCCL on GPUs.

The loop itself is `pipeline/finetuning.py`. Ray unpickles this module in processes that only steer; importing torch's and PEFT's
world there costs ten seconds of a CPU each, so that it is left to the workers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import cluster
from pipeline.arms import CURVE_FILE, Job
from pipeline.config import TrainConfig
from pipeline.storage import Folder
from pipeline.tables import COMPARISON

MAX_FAILURES = 2
TRIAL_CPUS = 0.01
"""Of the Ray Tune trial that waits for an arm."""


def fit(job: Job, storage: Folder, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train one arm, or go on with it where `storage` has a checkpoint of it.

    Returns:
        The arm's curve (rows of schema COMPARISON), its best step by validation NLL, the best checkpoint's name in
        `storage`, the seconds it took to start, and the step at which it diverged, if it did.
    """
    resources = training_resources(job.train)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=bool(resources.gpus),
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=storage.path,
            storage_filesystem=storage.files,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="eval_nll", checkpoint_score_order="min"
            ),
            worker_runtime_env=cluster.worker_env(resources),
            callbacks=list(callbacks),
        ),
    )
    result = trainer.fit()
    best = result.get_best_checkpoint("eval_nll", "min")
    assert best is not None
    last = result.checkpoint or best
    with last.as_directory() as folder:
        outcome: dict[str, Any] = json.loads((Path(folder) / CURVE_FILE).read_text())
    losses = [row["eval_nll"] for row in outcome["curve"]]
    return {
        **outcome,
        "best_step": outcome["curve"][int(np.argmin(losses))]["step"],
        "checkpoint": f"{job.name}/{Path(best.path).name}",
    }


def train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from pipeline.finetuning import Finetuning

    context = ray.train.get_context()
    finetuning = Finetuning(config["job"], context.get_world_rank(), context.get_world_size(), _report_to_ray)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            finetuning.restore(Path(folder))
    finetuning.run()


def training_resources(train: TrainConfig) -> cluster.Resources:
    """What one worker of an arm gets."""
    return cluster.worker_resources(train.cpus_per_worker, train.gpus_per_worker, train.workers)


def require_workers(train: TrainConfig) -> None:
    """See to it that the cluster can hold all workers of an arm at once.

    Raises:
        InputError: it cannot.
    """
    cluster.require(training_resources(train), "train", train.workers, beside=TRIAL_CPUS)


def curve_table(outcomes: Sequence[dict[str, Any]]) -> pa.Table:
    """The curves of all arms, schema COMPARISON."""
    return pa.Table.from_pylist([row for outcome in outcomes for row in outcome["curve"]], schema=COMPARISON)


def _report_to_ray(metrics: dict[str, Any], checkpoint: Path | None) -> None:
    """A barrier among the workers; returns when the checkpoint is stored."""
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(checkpoint)) if checkpoint else None)
