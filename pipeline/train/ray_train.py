"""One arm under Ray Train: several workers over gloo on CPUs, NCCL on GPUs.

The loop itself is `pipeline/train/loop.py`. Ray unpickles this module in its controller processes, too; importing torch's and
PEFT's world there costs ten seconds of a CPU each, so that it is left to the workers.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.train
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.cluster.resources import (
    MOST_AHEAD,
    Resources,
    compute_task,
    describe,
    require,
    torch_env,
    worker_resources,
    workers_at_once,
)
from pipeline.cluster.telemetry import WorkerLog, worker_log
from pipeline.config import TrainConfig
from pipeline.core.errors import PassTooLargeError
from pipeline.core.node_folder import folder_of_process
from pipeline.core.storage import Folder
from pipeline.core.tables import COMPARISON
from pipeline.train.arm import CURVE_FILE, Job
from pipeline.train.hedge import Hold, Wait

MAX_FAILURES = 2
HALVINGS = 6
"""Of a pass, from the largest that is chosen to the smallest: each costs workers that share the weights out a start."""
SIZES_FILE = "tokens_per_pass.json"
"""Beside an arm's checkpoints: what `PassTooLargeError` says, for the next attempt."""
Found = TypeVar("Found")
TUNE_STEP = "timesteps_total"
"""What Tune's loggers draw over, where it is reported."""


def fit(job: Job, storage: Folder, callbacks: Sequence[Any] = (), hold: Hold | None = None) -> dict[str, Any]:
    """Train one arm, or go on with it where `storage` has a checkpoint of it; with `hold`, no further than a hedge lets it.

    Returns:
        The arm's curve (rows of schema COMPARISON), its best step by validation NLL, the best checkpoint's name in
        `storage`, the padded tokens in a pass (with each smaller size that was taken for want of memory), the seconds that it
        took to start, that evaluations took, that steps waited for their rows and that all of this call took, and the step at
        which it diverged, if it did.
    """
    # Ray Train takes one report from its workers a look: at its default of 2 s no evaluation would take less.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    given = {"job": job, "storage": storage.sub(job.name), "hold": hold}
    kept = CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="eval_nll", checkpoint_score_order="min")
    trainer = _trainer(train_loop, given, job, storage, job.name, checkpoint_config=kept, callbacks=list(callbacks))
    started = time.perf_counter()
    result = trainer.fit()
    seconds = time.perf_counter() - started
    best = result.get_best_checkpoint("eval_nll", "min")
    assert best is not None
    last = result.checkpoint or best
    # This one file: a checkpoint of a large model, with the optimizer's state, has a hundred GB.
    outcome: dict[str, Any] = storage.sub(job.name, Path(last.path).name).read_json(CURVE_FILE)
    losses = [row["eval_nll"] for row in outcome["curve"]]
    return {
        **outcome,
        "fit_seconds": seconds,
        "best_step": outcome["curve"][int(np.argmin(losses))]["step"],
        "checkpoint": f"{job.name}/{Path(best.path).name}",
    }


def score_on_test(job: Job, checkpoints: dict[str, Folder], storage: Folder) -> dict[str, dict[str, float]]:
    """Metrics on the test split of each of several checkpoints, by workers such as trained them: for a base that no single
    device holds. `job` is that of any of the arms."""
    given = {"job": job, "checkpoints": checkpoints}
    found: dict[str, dict[str, float]] = _trainer(scoring_loop, given, job, storage, name=f"test-{job.key}").fit().return_value
    return found


def choose_on_test(job: Job, checkpoints: dict[str, Folder], storage: Folder, metric: str) -> dict[str, pa.Table]:
    """As `score_on_test`, the likeliest choices in place of the metrics; see `answers.choose`."""
    given = {"job": job, "checkpoints": checkpoints, "metric": metric}
    found: dict[str, pa.Table] = _trainer(choosing_loop, given, job, storage, name=f"{metric}-{job.key}").fit().return_value
    return found


def on_each(function: Callable[..., Any], job: Job, checkpoints: dict[str, Folder], *given: Any) -> Iterator[tuple[str, Any]]:
    """By Ray tasks what `function(base, dtype, data, checkpoint, *given)` gives of each checkpoint, with its name, as they come.
    `job` is that of any of the arms."""
    task = compute_task(function, job.train.cpus_per_worker, job.train.gpus_per_worker)
    coming = {task.remote(job.base, job.train.dtype, job.data, one, *given): name for name, one in checkpoints.items()}
    while coming:
        done = ray.wait(list(coming))[0][0]
        yield coming.pop(done), ray.get(done)


def train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Where workers share the weights out, one that runs out of memory ends them all; the next
    attempt goes on from the last checkpoint with smaller passes."""
    from pipeline.train.loop import Finetuning

    job: Job = config["job"]
    storage: Folder = config["storage"]
    wait = Wait(config["hold"]) if config["hold"] else None
    sizes = storage.read_json(SIZES_FILE) if storage.is_complete(SIZES_FILE) else ()
    context = ray.train.get_context()
    report = _Reports(storage, worker_log("train", job.arm.name))
    finetuning = Finetuning(job, context.get_world_rank(), context.get_world_size(), report, sizes=sizes, wait=wait)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            finetuning.restore(Path(folder))
    try:
        finetuning.run()
    except PassTooLargeError as error:
        storage.write_json(SIZES_FILE, error.sizes)
        raise


def scoring_loop(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each Ray Train worker runs for `score_on_test`."""
    from pipeline.train.evaluate import Rows, as_metrics, evaluate, on_test, sum_over_workers

    rows = Rows(config["job"].data.read_table("test.parquet"))

    def metrics(score: Any, rank: int, workers: int) -> dict[str, float]:
        return on_test(as_metrics(sum_over_workers(evaluate(score, rows, rank, workers), workers)))

    return _of_each(config, metrics)


def choosing_loop(config: dict[str, Any]) -> dict[str, pa.Table]:
    """What each Ray Train worker runs for `choose_on_test`."""
    from pipeline.model.base_model import load_tokenizer
    from pipeline.train.answers import choose

    job: Job = config["job"]
    rows, tokenizer = job.data.read_table("test.parquet"), load_tokenizer(job.base)

    def chosen(score: Any, rank: int, workers: int) -> pa.Table:
        return choose(score, rows, tokenizer, config["metric"], rank, workers)

    return _of_each(config, chosen)


def _of_each(config: dict[str, Any], look: Callable[[Any, int, int], Found]) -> dict[str, Found]:
    """By the names of the checkpoints what all workers find, from how one scores, its rank and their number."""
    from pipeline.train.worker_model import trained

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    trainables = ((name, trained(config["job"], checkpoint, workers)) for name, checkpoint in config["checkpoints"].items())
    return {name: look(one.score, rank, workers) for name, one in trainables}


def training_resources(train: TrainConfig) -> Resources:
    """What one worker of an arm gets."""
    return worker_resources(train.cpus_per_worker, train.gpus_per_worker, train.workers)


def training_kind(train: TrainConfig, named: bool = True) -> str:
    """What a measured speed of training holds for; `named` as of `resources.describe`."""
    method = train.method if train.quantize == "none" else f"{train.method} on {train.quantize}"
    workers = f"{train.workers} x {describe(training_resources(train), named)}"
    memory = f"{train.tokens_per_pass} tokens a pass, shared out: {train.shard}, checkpointing: {train.gradient_checkpointing}"
    return f"training, {method}, {train.dtype}, {train.batch_size} rows a step, {memory}, {workers}"


def arms_at_once(train: TrainConfig, arms: int) -> int:
    """How many of so many arms to start at once: those that there is room for, and where an autoscaler may bring nodes those that
    wait for them."""
    ahead = MOST_AHEAD * train.workers
    return max(1, workers_at_once(training_resources(train), arms * train.workers, ahead) // train.workers)


def require_workers(train: TrainConfig) -> None:
    """See to it that the cluster can hold all workers of an arm at once, or as few as it may have.

    Raises:
        InputError: it cannot.
    """
    require(training_resources(train), "train", train.min_workers or train.workers)


def curve_table(outcomes: Sequence[dict[str, Any]]) -> pa.Table:
    """The curves of all arms, schema COMPARISON."""
    return pa.Table.from_pylist([row for outcome in outcomes for row in outcome["curve"]], schema=COMPARISON)


def _trainer(
    loop: Callable[[dict[str, Any]], Any], given: dict[str, Any], job: Job, storage: Folder, name: str, **settings: Any
) -> TorchTrainer:
    """A Ray Train run of `loop` by the workers that an arm asks for; the other settings are those of RunConfig."""
    resources, train = training_resources(job.train), job.train
    return TorchTrainer(
        loop,
        train_loop_config=given,
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
            use_gpu=bool(resources.gpus),
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.files,
            failure_config=FailureConfig(max_failures=MAX_FAILURES + HALVINGS * train.shard),
            worker_runtime_env=torch_env(resources),
            **settings,
        ),
    )


class _Reports:
    """Gives evaluations to Ray Train, a barrier among the workers. Checkpoints are written and uploaded to `storage`, the arm's
    own folder, in the background, and count once they are stored. A worker has no more than one copy of its share: a second
    waits for the first to be written."""

    def __init__(self, storage: Folder, log: WorkerLog) -> None:
        self.storage, self.log, self.writer = storage, log, ThreadPoolExecutor(max_workers=1)
        self.written: Future[None] | None = None

    def __call__(self, metrics: dict[str, Any], snapshot: Callable[[], Callable[[Path], None] | None]) -> None:
        if self.written:
            self.written.result()
        given: dict[str, Any] = {}
        if write := snapshot():
            folder = folder_of_process() / uuid.uuid4().hex  # Ray removes it once it is stored
            folder.mkdir()
            self.written = self.writer.submit(write, folder)
            upload = partial(_upload, self.storage, self.written)
            given = {"checkpoint": Checkpoint.from_directory(folder), "checkpoint_upload_fn": upload}
        ray.train.report(
            metrics | {TUNE_STEP: metrics["step"]},
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            **given,
        )
        self.log.info("step %d, validation NLL %.4f", metrics["step"], metrics["eval_nll"])


def _upload(storage: Folder, written: Future[None], checkpoint: Checkpoint, name: str) -> Checkpoint:
    """What Ray Train does itself, after the checkpoint is written, but that each file is stored whole or not at all."""
    written.result()
    ray.train.get_context().get_storage()._check_validation_file()  # a disk that is not every node's
    storage.upload(Path(checkpoint.path), name)
    return Checkpoint(storage.join(name), storage.files)
