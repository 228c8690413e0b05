"""Trains arms side by side: Ray Tune runs one trial for each, and each trial is a Ray Train run. In a hedge a scheduler of Tune
decides on the way which of them go on to the end (`pipeline/train/hedge.py`)."""

import io
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler

from pipeline.cluster.telemetry import tell_training
from pipeline.config import TrackConfig
from pipeline.core.errors import one_line
from pipeline.core.storage import Folder
from pipeline.train import tracking
from pipeline.train.arm import HELD_FILE, RESULT_FILE, Job, keep_best
from pipeline.train.hedge import Hedge, Hold
from pipeline.train.ray_train import arms_at_once, fit, require_workers

HEAD = "node:__internal_head__"
"""Ray's resource of the head, the one node that is there as long as the cluster: others come and go."""

Outcome = dict[str, Any]
"""What `ray_train.fit` returns, with the arm's `name`, `init`, `lr` and `seed`."""


def train_arms(
    jobs: Sequence[Job],
    storage: Folder,
    say: Callable[[str], None],
    run: str,
    tracked: TrackConfig | None = None,
    decide_at: int | None = None,
) -> list[Outcome]:
    """Train every arm that has no result yet in `storage`, side by side where the cluster has room.

    Args:
        run: what its metrics call the run.
        tracked: where the curves go besides.
        decide_at: the arms are those of a hedge, and this is the step of its decision.

    Raises:
        InputError: what they are to be tracked or quantised with cannot be had.
        RuntimeError: an arm failed; the others' results are kept.
    """
    hedge = Hedge(jobs, storage, decide_at, say) if decide_at else None
    while todo := _left(jobs, storage, hedge):
        from pipeline.train.quantised_base import require_bitsandbytes  # not above: see pipeline/train/ray_train.py

        tracked = tracked or TrackConfig()
        tracking.check(tracked)
        require_bitsandbytes(todo[0].train)
        _tune(todo, storage, [_Follow(say, run, todo[0].train.steps), *tracking.callbacks(tracked, storage.path)], hedge)
    outcomes = [hedge.outcome(job) if hedge else storage.read_json(f"{job.name}/{RESULT_FILE}") for job in jobs]
    for outcome in outcomes:
        keep_best(storage, outcome["checkpoint"])  # of each: who is killed in it once did not come to all
    return outcomes


def _left(jobs: Sequence[Job], storage: Folder, hedge: Hedge | None) -> list[Job]:
    """The arms that have something left to train; those of a hedge once until it can be decided, and again where one that goes on
    had to give up its place."""
    if not hedge:
        return [job for job in jobs if not storage.is_complete(f"{job.name}/{RESULT_FILE}")]
    hedge.look()
    return [job for job in jobs if not hedge.has_ended(job)]


def _tune(jobs: Sequence[Job], storage: Folder, callbacks: list[tune.Callback], hedge: Hedge | None = None) -> None:
    train = jobs[0].train
    require_workers(train)
    at_once = arms_at_once(train, len(jobs))
    holds = {job.name: hedge.hold_of(job, beside=at_once >= len(jobs)) for job in jobs} if hedge else {}
    drive = tune.with_parameters(_drive, jobs={job.name: job for job in jobs}, storage=storage, holds=holds)
    tuner = tune.Tuner(
        # The trial only waits for its Ray Train run, which takes the resources, and which its node's loss would end.
        tune.with_resources(drive, tune.PlacementGroupFactory([{HEAD: 0.001}])),
        param_space={"arm": tune.grid_search([_about(job) for job in jobs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            scheduler=_Decider(hedge) if hedge else None,
            reuse_actors=hedge is None,  # of arms that run one after the other one process waits for all
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


def _drive(trial: dict[str, Any], jobs: dict[str, Job], storage: Folder, holds: dict[str, Hold]) -> None:
    """One Tune trial: a Ray Train run of an arm. Its result is on disk before the trial ends."""
    job = jobs[trial["arm"]["name"]]
    hold = holds.get(job.name)
    outcome = fit(job, storage, callbacks=[TuneReportCallback()], hold=hold)
    if hold and outcome["curve"][-1]["step"] == hold.step and outcome["diverged_at"] is None:
        storage.write_json(f"{job.name}/{HELD_FILE}", _about(job) | outcome)
        return
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


class _Decider(FIFOScheduler):
    """Makes the decision of a hedge as soon as the last arm has come to its step. The arm that is stopped reads that, as it waits
    at the step, and ends by itself: Tune's STOP would kill it before its result is written."""

    def __init__(self, hedge: Hedge) -> None:
        super().__init__()
        self._hedge = hedge

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles it with its config; nobody goes on with that."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("step") == self._hedge.step:
            self._hedge.note(_trial_name(trial), math.inf if result.get("diverged") else result["eval_nll"])
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """An arm that ends before the step has diverged, as its result tells."""
        self._hedge.look()


def _trial_name(trial: Any) -> str:
    return str(trial.config["arm"]["name"])
