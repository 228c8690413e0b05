"""Trains arms side by side: Ray Tune runs one trial for each, and each trial is a Ray Train run."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.cluster.telemetry import tell_training
from pipeline.config import TrackConfig
from pipeline.core.errors import one_line
from pipeline.core.storage import Folder
from pipeline.train import tracking
from pipeline.train.arm import Job, keep_best
from pipeline.train.ray_train import arms_at_once, fit, require_workers

RESULT_FILE = "result.json"

HEAD = "node:__internal_head__"
"""Ray's resource of the head, the one node that is there as long as the cluster: others come and go."""

Outcome = dict[str, Any]
"""What `ray_train.fit` returns, with the arm's `name`, `init`, `lr` and `seed`."""


def train_arms(
    jobs: Sequence[Job], storage: Folder, say: Callable[[str], None], run: str, tracked: TrackConfig | None = None
) -> list[Outcome]:
    """Train every arm that has no result yet in `storage`, side by side where the cluster has room.

    Args:
        run: what its metrics call the run.
        tracked: where the curves go besides.

    Raises:
        InputError: what they are to be tracked or quantised with cannot be had.
        RuntimeError: an arm failed; the others' results are kept.
    """
    todo = [job for job in jobs if not storage.is_complete(f"{job.name}/{RESULT_FILE}")]
    if todo:
        from pipeline.train.quantised_base import require_bitsandbytes  # not above: see pipeline/train/ray_train.py

        tracked = tracked or TrackConfig()
        tracking.check(tracked)
        require_bitsandbytes(todo[0].train)
        _tune(todo, storage, [_Follow(say, run, todo[0].train.steps), *tracking.callbacks(tracked, storage.path)])
    outcomes = [storage.read_json(f"{job.name}/{RESULT_FILE}") for job in jobs]
    for outcome in outcomes:
        keep_best(storage, outcome["checkpoint"])  # of each: who is killed in it once did not come to all
    return outcomes


def _tune(jobs: Sequence[Job], storage: Folder, callbacks: list[tune.Callback]) -> None:
    train = jobs[0].train
    require_workers(train)
    drive = tune.with_parameters(_drive, jobs={job.name: job for job in jobs}, storage=storage)
    tuner = tune.Tuner(
        # The trial only waits for its Ray Train run, which takes the resources, and which its node's loss would end.
        tune.with_resources(drive, tune.PlacementGroupFactory([{HEAD: 0.001}])),
        param_space={"arm": tune.grid_search([_about(job) for job in jobs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=arms_at_once(train, len(jobs)),
            reuse_actors=True,  # of arms that run one after the other one process waits for all
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.path,
            storage_filesystem=storage.files,
            verbose=0,
            callbacks=callbacks,
        ),
    )
    with redirect_stdout(io.StringIO()):  # Tune prints what it is set up with, whatever its verbosity
        results = tuner.fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(jobs)} training arms failed: {one_line(results.errors[0])}")


def _drive(trial: dict[str, Any], jobs: dict[str, Job], storage: Folder) -> None:
    """One Tune trial: a Ray Train run of an arm. Its result is on disk before the trial ends."""
    job = jobs[trial["arm"]["name"]]
    outcome = fit(job, storage, callbacks=[TuneReportCallback()])
    storage.write_json(f"{job.name}/{RESULT_FILE}", _about(job) | outcome)
    with suppress(OSError):  # `train_arms` comes to it again
        keep_best(storage, outcome["checkpoint"])


def _about(job: Job) -> dict[str, Any]:
    return {"name": job.name, "init": job.arm.init, "lr": job.arm.lr, "seed": job.arm.seed}


class _Follow(tune.Callback):
    """Says each evaluation of each arm as it comes."""

    def __init__(self, say: Callable[[str], None], run: str, steps: int) -> None:
        self._say, self._run, self._steps = say, run, steps

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks with the state of the experiment; the terminal stays here."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "eval_nll" in result:  # the last result of a trial carries no metrics
            tell_training(self._run, _trial_name(trial), result["tokens"], result["seconds"])
            where = f"{_trial_name(trial)}: step {result['step']}/{self._steps}"
            self._say(f"{where}, validation NLL {result['eval_nll']:.4f}, {result['seconds']:.0f} s of training")


def _trial_name(trial: Any) -> str:
    return str(trial.config["arm"]["name"])
