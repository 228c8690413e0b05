"""A few finetuning steps from each of a short list of starts, and the loss on held-out rows after them.

The loss before any step misses related donors that are confidently wrong at first, and says nothing of how a start learns.
"""

import math
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.cluster.resources import compute_task
from pipeline.core.parts import part_names, write_part
from pipeline.core.storage import Folder
from pipeline.train.arm import Job


def write_probe_data(data: Folder, holdout: pa.Table, target: Folder) -> None:
    """The training rows without the held-out ones, and these as what is validated on."""
    target.delete("train.parquet")  # of an attempt that broke off, or of an older version
    held = holdout["sample_id"].combine_chunks()
    for number, file in enumerate(part_names(data, "train.parquet")):
        rows = data.read_table(file)
        write_part(target, f"train.parquet/{number:05d}.parquet", rows.filter(pc.invert(pc.is_in(rows["sample_id"], held))))
    target.write_table("validation.parquet", holdout)


def probe(jobs: Mapping[str, Job], results: Folder, say: Callable[[str], None]) -> dict[str, float | None]:
    """Run the jobs as Ray tasks, side by side where the cluster has room; those that have a file in `results` are not run again.

    Returns:
        For each name the mean NLL on the held-out rows after the last step; None where training diverged.
    """
    known = {name: results.read_json(f"{name}.json") for name in jobs if results.is_complete(f"{name}.json")}
    train = next(iter(jobs.values())).train
    task = compute_task(_loss_after_training, train.cpus_per_worker, train.gpus_per_worker)
    waiting = {task.remote(job): name for name, job in jobs.items() if name not in known}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        name = waiting.pop(done)
        known[name] = {"nll": ray.get(done)}
        results.write_json(f"{name}.json", known[name])
        say(f"probe of {name}: hold-out NLL {known[name]['nll']}")
    return {name: known[name]["nll"] for name in jobs}


def _loss_after_training(job: Job) -> float | None:
    from pipeline.train.loop import Finetuning  # not above: see pipeline/train/ray_train.py

    finetuning = Finetuning(job, 0, 1, lambda metrics, save: None)
    finetuning.run()
    nll = finetuning.curve[-1]["eval_nll"]
    return None if finetuning.diverged_at is not None or not math.isfinite(nll) else float(nll)
