"""The whole method on one page: `mashup run CONFIG.yaml` is `run_all`.

    index    adapters of the pool            -> catalogue.parquet
    samples  rows of the target task         -> samples.parquet, data/
    search   catalogue x samples             -> scores/, leaderboard.parquet
    merge    leaderboard -> recipes -> merge -> selection.json, mashup/
    compare  base against mashup             -> train/, comparison.parquet, summary.json, finetuned/
    report   all of the above                -> report.html

Only this module knows the order. Each stage leaves its results in the run folder, is skipped where they are there for the same
input, and goes on where it was interrupted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.adapters.pool import build_catalogue, list_adapters, valid_adapters
from pipeline.config import SHORT_LIST, Config, TrainConfig
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.settings import checked
from pipeline.core.storage import Folder
from pipeline.core.tables import CATALOGUE, LEADERBOARD, SAMPLES, VERSION, require
from pipeline.data.splits import split_of, take_samples, target_paths
from pipeline.merge.candidates import list_arms, make_controls, make_jobs, probe_starts, probed_training, score_recipes
from pipeline.merge.selection import largest_merge, propose, ranked, selection
from pipeline.model.base_model import fingerprint, linear_shapes
from pipeline.plan.calibrate import calibrate
from pipeline.plan.estimate import estimate_before_search, settle, write_plan
from pipeline.report.model_card import model_card
from pipeline.report.page import write_report
from pipeline.run_folder import Run
from pipeline.search.contamination import find_contamination
from pipeline.search.engine_pool import Engines, require_engine, warm_up
from pipeline.search.leaderboard import build_leaderboard, score_table, unsound
from pipeline.search.score_store import read_failures
from pipeline.search.scoring import by_rank, largest_rank, line_up, make_engine, race, score_outliers, screened, servable
from pipeline.train import tracking
from pipeline.train.arm import Arm, Job, copy_weights, row_ids
from pipeline.train.compare import RESULT_FILE, train_arms, with_overhead
from pipeline.train.compare import compare as compare_arms
from pipeline.train.ray_train import require_workers

OVERHEAD = ("index", "samples", "search", "merge")
"""Stages that a start from the base does without."""


def run_all(config: Config) -> dict[str, Any]:
    """The method, from adapters to report. Returns the summary.

    Raises:
        InputError: the input is not right; nothing is left behind by the stage that found it.
    """
    run = open_run(config, require_room)
    engines = Engines(config.search)
    with engines.kept():
        index(run, then_search=True)
        samples(run)
        search(run, engines)
        merge_donors(run, engines)
    compare(run)
    report(run)
    summary: dict[str, Any] = run.folder.read_json("summary.json")
    return summary


def run_search(config: Config) -> Folder:
    """The first half: adapters to leaderboard. Returns the run's folder.

    Raises:
        InputError: as for `run_all`.
    """
    run = open_run(config, lambda run: require_engine(run.config.search))
    index(run)
    samples(run)
    search(run)
    return run.folder


def plan_run(config: Config) -> dict[str, Any]:
    """What `run_all` would do and cost, estimated before anything is scored, merged or trained: `plan.json`.

    The index and the samples are made for real, as the estimate needs them, and kept. Where no earlier run measured how fast
    this cluster is, a short calibration does; its scores are kept, too.

    Raises:
        InputError: as for `run_all`.
    """
    run = open_run(config, require_room)
    index(run)
    samples(run)
    run.progress.stage("plan")
    run.start_ray()
    calibrate(run)
    catalogue, drawn = valid_adapters(run.folder.read_table("catalogue.parquet")), run.folder.read_table("samples.parquet")
    searched = run.ledger.done("search", _search_key(run, catalogue, drawn))
    return write_plan(run, merged=searched and run.ledger.done("merge", _merge_key(run)))


def open_run(config: Config, once_joined: Callable[[Run], None]) -> Run:
    """The run folder with what is asked in it, where that can be had; `once_joined` is called when the cluster is at hand.

    Raises:
        InputError: there is nothing at a path, or a package for `track` is missing: said now, not after an hour of indexing.
    """
    target_paths(config)
    tracking.check(config.track)
    if config.search.store:
        Folder.at(config.search.store).create()
    run = Run(config, once_joined)
    run.save_config()
    return run


def require_room(run: Run) -> None:
    """See to it that the cluster can hold what the stages to come ask for: said before the first of them works.

    Raises:
        InputError: it cannot.
    """
    if not run.ledger.done("merge"):
        require_engine(run.config.search)
    if not run.ledger.done("compare"):
        require_workers(run.config.train)


def index(run: Run, then_search: bool = False) -> None:
    """Check every adapter of the pool.

    Args:
        then_search: let workers import meanwhile what a search needs.
    """
    config = run.config
    linear_shapes(config.base)  # an unknown base is said before anything starts
    listing = list_adapters(config.pool, config.exclude)
    key = digest(VERSION, fingerprint(config.base), listing, Folder.at(config.pool).state())
    if run.ready("index", key):
        return
    run.progress.say(f"checking {len(listing['uri'])} adapters of {config.pool} against {config.base}")
    if then_search:
        warm_up(config.search)
    with run.ledger.perform("index", key) as details:
        factored = run.folder.sub("factored").uri
        checked = lambda n, total: run.progress.count(n, total, "adapters checked")  # noqa: E731
        catalogue = build_catalogue(config.base, config.pool, factored, checked, listing)
        run.folder.write_table("catalogue.parquet", catalogue)
        details["adapters"], details["set_aside"] = len(catalogue), len(catalogue) - len(valid_adapters(catalogue))
    run.progress.say(f"{len(valid_adapters(catalogue))} valid, {details['set_aside']} set aside")


def samples(run: Run) -> None:
    """Draw the sample of the target task and tokenise its training splits."""
    config = run.config
    files = [Folder.at(path).state() for path in target_paths(config).values()]
    key = digest(fingerprint(config.base), config.target.model_dump(), files, _sampling(config))
    if run.ready("samples", key):
        return
    with run.ledger.perform("samples", key):
        splits = take_samples(config)
        for name, table in splits.training.items():
            run.folder.write_table(f"data/{name}.parquet", table)
        sizes = {name: len(table) for name, table in splits.training.items()}
        drawn = {split: len(split_of(splits.search, split)) for split in ("search", "holdout")}
        run.folder.write_json("samples.json", drawn | sizes | {"rows": splits.counts})
        run.folder.write_table("samples.parquet", require(splits.search, SAMPLES, "samples"))
    run.progress.say(", ".join(f"{count} {name}" for name, count in (drawn | sizes).items()))
    passed_over = {k: n for counts in splits.counts.values() for k, n in counts.items() if k != "used" and n}
    if passed_over:
        run.progress.say("passed over: " + ", ".join(f"{count} x {problem}" for problem, count in passed_over.items()))


def search(run: Run, engines: Engines | None = None) -> None:
    """Race the base and every valid adapter over the samples, within the budget, and rank them.

    Args:
        engines: those that the merge uses, too; None: of its own.
    """
    run.needs("index", "the catalogue", "mashup index")
    run.needs("samples", "the sample", "mashup search")
    config, engines = run.config, engines or Engines(run.config.search)
    catalogue = valid_adapters(require(run.folder.read_table("catalogue.parquet"), CATALOGUE, "catalogue.parquet"))
    drawn = require(run.folder.read_table("samples.parquet"), SAMPLES, "samples.parquet")
    key = _search_key(run, catalogue, drawn)
    if run.ready("search", key):
        return
    estimate_before_search(run)
    with run.ledger.perform("search", key) as details:
        failures = run.folder.sub("failures")
        _tell_contamination(run, catalogue, drawn)
        catalogue = screened(run, servable(run, catalogue, failures), drawn)
        usual, outliers = by_rank(run, catalogue)
        score_outliers(run, engines, outliers, drawn, failures, details)
        work, plan = line_up(run, catalogue, drawn, failures)
        merged = largest_merge(usual["rank"].to_pylist(), config.merge) if engines.keeping else 0
        engine = make_engine(run, catalogue, largest_rank(run, usual, merged))
        known, seen = race(run, engines, work, engine, plan, details, config.search.budget.seconds)
        names = work.candidates["adapter_id"].to_pylist()
        run.folder.write_json("scoring_failures.json", read_failures(work.failures) | unsound(names, known, seen))
        run.folder.write_table("scores/scores.parquet", score_table(names, known, drawn["sample_id"].to_pylist()))
        run.folder.write_table("leaderboard.parquet", build_leaderboard(names, known, seen, len(split_of(drawn, "search"))))
        work.store.merge_files()


def merge_donors(run: Run, engines: Engines | None = None) -> None:
    """Choose donors and merge them, or nobody: each candidate merge is scored on the hold-out samples by the same engine.

    Args:
        engines: as in `search`.
    """
    run.needs("search", "the leaderboard", "mashup search")
    key = _merge_key(run)
    if run.ready("merge", key):
        return
    engines = engines or Engines(run.config.search)
    catalogue = valid_adapters(run.folder.read_table("catalogue.parquet"))
    leaderboard = require(run.folder.read_table("leaderboard.parquet"), LEADERBOARD, "leaderboard.parquet")
    with run.ledger.perform("merge", key) as details:
        scored, base_nll = score_recipes(run, engines, propose(leaderboard, catalogue, run.config.merge), catalogue, details)
        contamination = run.folder.read_json("contamination.json")
        probed = probe_starts(run, engines, ranked(scored)[:SHORT_LIST])
        choice = selection(scored, leaderboard, catalogue, contamination, base_nll, probed)
        if choice["recipe"]:
            copy_weights(run.folder.sub("candidates", choice["recipe"]["name"]), run.folder.sub("mashup"))
            card = model_card(choice, run.config, run.folder.read_json("samples.json"))
            run.folder.write_text("mashup/README.md", card)
        run.folder.write_json("selection.json", choice)
    run.progress.say(f"verdict: start from the {choice['verdict']}; {choice['why']}")


def train(run: Run, init: str | None, lr: float | None, seed: int | None, profile: bool = False) -> str:
    """Finetune one arm; by default from what the selection chose, at the first learning rate and seed.

    Args:
        profile: leave a trace of some steps in `profile/`.

    Returns:
        The folder of its best checkpoint.

    Raises:
        InputError: there is no mashup to start from, or nothing left to train and so to profile.
    """
    run.needs("merge", "the selection", "mashup merge")
    chosen = init or run.folder.read_json("selection.json")["verdict"]
    if chosen == "mashup" and not run.folder.exists("mashup"):
        raise InputError(f"{run.folder.uri}: there is no mashup to start from (the selection chose the base); use --init base")
    settings = run.config.train
    given = {name: [value] for name, value in {"learning_rates": lr, "seeds": seed}.items() if value is not None}
    settings = checked(TrainConfig, settings.model_dump() | given, "mashup train")
    arm = Arm(chosen, settings.learning_rates[0], settings.seeds[0])
    run.progress.stage("train")
    run.start_ray()
    job = make_jobs(run, [arm])[0]
    if profile:
        job = _profiled(run, job)
    outcome = train_arms([job], run.folder.sub("train"), run.progress.say, run.config.track)[0]
    return run.folder.sub("train", outcome["checkpoint"]).uri


def compare(run: Run) -> None:
    """Finetune every init at every learning rate and seed, and say what the mashup gained, all overhead counted."""
    run.needs("merge", "the selection", "mashup merge")
    config, choice = run.config, run.folder.read_json("selection.json")
    n_donors = len(choice["donors"])
    arms = list_arms(config, ["base", *(["mashup"] if n_donors else []), *make_controls(run, n_donors)])
    jobs = make_jobs(run, arms)
    key = digest([job.name for job in jobs], row_ids(run.folder.sub("data"), "test"))
    if run.ready("compare", key):
        return
    if choice["verdict"] == "base" and "mashup" in config.compare.inits:
        run.progress.say("no donor beats the base: the mashup start is the base start, and is not trained twice")
    with run.ledger.perform("compare", key) as details:
        trained = run.folder.sub("train")
        outcomes = train_arms(jobs, trained, _said_and_timed(run), config.track)
        curves, result = compare_arms(jobs, outcomes, trained)
        details["startup_seconds"] = sum(outcome["startup_seconds"] for outcome in outcomes)
        run.folder.write_table("comparison.parquet", curves)
        run.folder.write_json("summary.json", _summary(run, choice, result) | settle(run, outcomes))


def report(run: Run) -> str:
    """Write the page from whatever the run has. Returns where it is."""
    run.progress.stage("report")
    uri = write_report(run.folder)
    run.progress.say(uri)
    return uri


def _profiled(run: Run, job: Job) -> Job:
    if run.folder.is_whole(f"train/{job.name}/{RESULT_FILE}"):
        raise InputError(f"{run.folder.uri}: {job.arm.name} is trained already; profile another --lr or --seed")
    folder = run.folder.sub("profile")
    run.progress.say(f"trace of the first steps: {folder.uri}/{job.trace}")
    return replace(job, profile=folder)


def _tell_contamination(run: Run, catalogue: pa.Table, drawn: pa.Table) -> None:
    """Say which adapters were trained on the target's own rows, by their cards."""
    held = {split: run.folder.read_table(f"data/{split}.parquet") for split in ("validation", "test")}
    found = find_contamination(catalogue, run.config.base, run.config.target.train, {"sample": drawn, **held})
    run.folder.write_json("contamination.json", found)
    for name, sentences in found.items():
        run.progress.say(f"{name}: {'; '.join(sentences)}")


def _search_key(run: Run, catalogue: pa.Table, drawn: pa.Table) -> str:
    asked = run.config.search.model_dump(include={"engine", "dtype", "budget", "screen"})
    hashes = catalogue["adapter_hash"].to_pylist()
    return digest(fingerprint(run.config.base), drawn["sample_id"].to_pylist(), hashes, asked)


def _merge_key(run: Run) -> str:
    return digest(run.ledger.key("search"), run.config.merge.model_dump(), probed_training(run.config))


def _summary(run: Run, choice: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    overhead = {stage: run.ledger.seconds(stage) for stage in OVERHEAD}
    total = sum(overhead.values())
    best = min(result["inits"].values(), key=lambda init: init["validation_nll_best"])
    copy_weights(run.folder.sub(*best["checkpoint"].split("/")), run.folder.sub("finetuned"))
    return {
        "verdict": choice["verdict"],
        "why": choice["why"],
        "donors": [donor["adapter_id"] for donor in choice["donors"]],
        "recipe": choice["recipe"]["name"] if choice["recipe"] else None,
        "inits": result["inits"],
        "parity": with_overhead(result["parity"], total) if "parity" in result else None,
        "overhead_seconds": {**overhead, "total": total},
        "adapter": run.folder.sub("finetuned").uri,
        "note": "Seconds of training leave evaluation and start-up out for every init alike; overhead is the wall-clock of "
        "index, samples, search over all candidates and merge, engine start included.",
    }


def _said_and_timed(run: Run) -> Callable[[str], None]:
    def say(text: str) -> None:
        run.progress.say(text)
        run.ledger.beat()

    return say


def _sampling(config: Config) -> tuple[int, float, int]:
    return config.search.samples, config.search.holdout, config.search.seed
