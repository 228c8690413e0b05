"""The whole method on one page: `mashup run CONFIG.yaml` is `run_all`.

    index    adapters of the pool            -> catalogue.parquet
    samples  rows of the target task         -> samples.parquet, data/
    search   catalogue x samples             -> scores/, leaderboard.parquet
    merge    leaderboard -> recipes -> merge -> selection.json, mashup/
    compare  base against mashup             -> train/, comparison.parquet, summary.json, finetuned/, metric_rows.parquet
    report   all of the above                -> report.html

The stages are called in this order; `run_folder.STAGES` repeats it. Each leaves its results in the run folder and is skipped
where they are there for the same input, but for the report; search, merge and compare resume where they were interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline.adapters.catalogue import valid_adapters_of
from pipeline.adapters.index import index
from pipeline.config import Config
from pipeline.core.storage import Folder
from pipeline.data.sample import samples
from pipeline.data.splits import target_paths
from pipeline.merge.controls import make_controls
from pipeline.merge.mashup import merge_donors, merge_key
from pipeline.merge.past_verdicts import foretell_decision, keep_verdict
from pipeline.merge.selection import largest_merge
from pipeline.plan.calibrate import calibrate
from pipeline.plan.estimate import compare_with_plan, estimate_before_search, write_plan
from pipeline.report.finetuned_card import write_finetuned_card
from pipeline.report.page import write_report
from pipeline.run_folder import Run
from pipeline.search.early_engine import begin_early
from pipeline.search.engine_pool import Engines, require_engine
from pipeline.search.search import search, search_key, search_together
from pipeline.train import tracking
from pipeline.train.comparison import compare_starts, train_one
from pipeline.train.metric import check, try_out
from pipeline.train.quantised_base import require_bitsandbytes
from pipeline.train.ray_train import require_workers
from pipeline.train.starts import shapes_of


def run_all(config: Config) -> dict[str, Any]:
    """The method, from adapters to report. Returns the summary.

    Raises:
        InputError: the input is not right; nothing is left behind by the stage that found it.
        LockTakenError, LockLostError: another process works in the run folder, or may by now, as this one slept or hung.
    """
    with open_run(config, require_room) as run:
        _to_the_merge(run)
        compare(run)
        report(run)
        return dict(run.folder.read_json("summary.json"))


def find_start(config: Config) -> dict[str, Any]:
    """The method up to the merge: the adapter to start a finetune from, and nothing is trained. Returns the selection.

    Raises:
        InputError, LockTakenError, LockLostError: as for `run_all`.
    """
    with open_run(config, lambda run: require_engine(run.config.search)) as run:
        _to_the_merge(run)
        report(run)
        return dict(run.folder.read_json("selection.json"))


def _to_the_merge(run: Run) -> None:
    engines = Engines(run.config.search)
    with engines.kept():
        index(run, meanwhile=partial(begin_early, run, engines, partial(largest_merge, config=run.config.merge)))
        _samples(run)
        search_and_merge(run, engines)


def _samples(run: Run) -> None:
    """With a look at whether the metric that is asked for can be had of them: said now, not after hours of search."""
    samples(run)
    try_out(run)


def search_and_merge(run: Run, engines: Engines) -> None:
    """The two stages that share engines."""
    search_for_merge([run], engines)
    merge_donors(run, engines)


def search_for_merge(runs: Sequence[Run], engines: Engines) -> None:
    """The searches of runs with one pool and one config of search and merge, side by side. Engines that they start have room for
    the merges of their donors."""
    if runs:
        search_together(runs, engines, partial(largest_merge, config=runs[0].config.merge), estimate_before_search)


def run_search(config: Config) -> Folder:
    """The first half: adapters to leaderboard. Returns the run's folder.

    Raises:
        InputError, LockTakenError, LockLostError: as for `run_all`.
    """
    with open_run(config, lambda run: require_engine(run.config.search)) as run:
        index(run)
        _samples(run)
        search(run, on_start=estimate_before_search)
        return run.folder


def plan_run(config: Config) -> dict[str, Any]:
    """What `run_all` would do and cost, estimated before anything is scored, merged or trained: `plan.json`. The index and the
    samples are made for real, and kept; so are the scores of a calibration, where no earlier run measured this cluster's speed.

    Raises:
        InputError, LockTakenError, LockLostError: as for `run_all`.
    """
    with open_run(config, require_room) as run:
        index(run)
        _samples(run)
        run.progress.stage("plan")
        run.start_ray()
        catalogue, drawn = valid_adapters_of(run.folder), run.folder.read_table("samples.parquet")
        calibrate(run, catalogue)
        searched = run.ledger.done("search", search_key(run, catalogue, drawn))
        return write_plan(run, merged=searched and run.ledger.done("merge", merge_key(run)))


def compare(run: Run) -> None:
    """Finetune from the base, the mashup and the controls, and compare them.

    Raises:
        InputError: the merge is not done.
    """
    run.needs("merge", "the selection", "mashup merge")
    choice, catalogue = run.folder.read_json("selection.json"), valid_adapters_of(run.folder)
    shapes = shapes_of(run, catalogue)
    controls = make_controls(run, len(choice["donors"]), catalogue, shapes)
    compare_starts(run, choice, controls, shapes.trained, partial(_learn, choice=choice))
    write_finetuned_card(run)


def _learn(run: Run, outcomes: list[dict[str, Any]], choice: dict[str, Any]) -> dict[str, Any]:
    """Keep what later runs can use; gives what earlier ones, and the plan, had said of this one."""
    keep_verdict(run, choice, outcomes)
    return foretell_decision(run, outcomes) | compare_with_plan(run, outcomes)


def train(run: Run, init: str | None, lr: float | None, seed: int | None, profile: bool = False) -> str:
    """Finetune one arm; as `train_one`."""
    run.needs("merge", "the selection", "mashup merge")
    return train_one(run, shapes_of(run, valid_adapters_of(run.folder)).trained, init, lr, seed, profile)


def report(run: Run) -> str:
    """Write the page from whatever the run has. Returns where it is."""
    run.progress.stage("report")
    run.progress.say(uri := write_report(run.folder))
    return uri


@contextmanager
def open_run(config: Config, once_joined: Callable[[Run], None]) -> Iterator[Run]:
    """The run folder, locked, with what is asked in it, where that can be had; `once_joined` is called when the cluster is there.

    Raises:
        InputError: there is nothing at a path, or a package for `track` or `train.quantize` or a function for `compare.metric` is
            missing: said now, not after an hour of indexing.
        LockTakenError: another process works in the run folder.
    """
    target_paths(config)
    tracking.check(config.track)
    require_bitsandbytes(config.train)
    check(config.compare.metric)
    if config.search.store:
        Folder.at(config.search.store).create()
    run = Run(config, once_joined)
    run.require_own()  # before a lock is left in a folder of the user's
    with run.locked():
        run.save_config()
        yield run


def require_room(run: Run) -> None:
    """See to it that the cluster can hold what the stages to come ask for: said before the first of them works.

    Raises:
        InputError: it cannot.
    """
    if not run.ledger.done("merge"):
        require_engine(run.config.search)
    if not run.ledger.done("compare"):
        require_workers(run.config.train)
