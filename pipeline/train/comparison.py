"""The stage `compare`: the base against the mashup -> train/, comparison.parquet, summary.json and finetuned/; with
`compare.metric` also metric_rows.parquet."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.config import TrainConfig
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.settings import checked
from pipeline.core.stats import best_init
from pipeline.run_folder import Run
from pipeline.train.arm import RESULT_FILE, SECONDS_FILE, Arm, Job, Lora, copy_weights, row_ids
from pipeline.train.curves import chosen_arms, compare_arms, spread, with_overhead
from pipeline.train.hedge import Hedge
from pipeline.train.metric import measure, metric_key, try_out
from pipeline.train.starts import decided_at, list_arms, make_jobs
from pipeline.train.tune import Outcome, train_arms

OVERHEAD = ("index", "samples", "search", "merge")
"""Stages whose time is charged to the mashup."""

CompareWithPlan = Callable[[Run, list[Outcome]], dict[str, Any]]


def compare_starts(run: Run, choice: dict[str, Any], controls: list[str], lora: Lora, compare_with_plan: CompareWithPlan) -> None:
    """Finetune every init at every learning rate and seed, and say what the mashup gained, all overhead counted; in a hedge,
    which of base and mashup went on, and what that cost.

    Args:
        choice: the selection, as in selection.json.
        controls: the starts in `starts/` that are compared besides.
        lora: the shape of the adapters that the arms train, where they do.
        compare_with_plan: gives what the summary says besides, from the outcomes of the arms.
    """
    config = run.config
    arms = list_arms(config, ["base", *(["mashup"] if choice["donors"] else []), *controls])
    jobs, decide_at = make_jobs(run, arms, lora), decided_at(config, arms)
    metric, data = config.compare.metric, run.folder.sub("data")
    key = digest([job.name for job in jobs], row_ids(data, "test"), *([metric_key(metric, data)] if metric else []))
    if run.ready("compare", key):
        return
    if choice["verdict"] == "base" and "mashup" in config.compare.inits:
        run.progress.say("no donor beats the base: the mashup start is the base start, and is not trained twice")
    try_out(run)
    with run.ledger.perform("compare", key) as details:
        trained = run.folder.sub("train")
        outcomes = train_arms(jobs, trained, _said_and_timed(run), run.folder.uri, config.track, decide_at)
        decision = Hedge(jobs, trained, decide_at).decision if decide_at else None
        curves, result = compare_arms(jobs, outcomes, trained, decision)
        if metric:
            details |= _measure(run, metric, jobs[0], outcomes, result)
        details["startup_seconds"] = sum(outcome["startup_seconds"] for outcome in outcomes)
        run.check()
        run.folder.write_table("comparison.parquet", curves)
        run.folder.write_json("summary.json", _summary(run, choice, result) | compare_with_plan(run, outcomes))


def _measure(run: Run, metric: str, job: Job, outcomes: list[Outcome], result: dict[str, Any]) -> dict[str, float]:
    """Add the metric to the result of each init that has test figures, and write its rows; gives how long that took, and for how
    many arms."""
    started = time.perf_counter()
    tested = [outcome for outcome in outcomes if "test_nll" in result["inits"].get(outcome["init"], {})]
    found = measure(metric, job, chosen_arms(tested), run.folder.sub("train"))
    spent = {"metric_seconds": time.perf_counter() - started, "metric_arms": found.answered}
    result["metric"] = metric
    for init, means in found.means.items():
        result["inits"][init]["test_metric"] = spread(means)
    run.check()
    run.folder.write_table("metric_rows.parquet", found.rows)
    return spent


def train_one(run: Run, lora: Lora, init: str | None, lr: float | None, seed: int | None, profile: bool = False) -> str:
    """Finetune one arm; by default from what the selection chose, at the first learning rate and seed.

    Args:
        lora: the shape of the adapter that it trains, where it does.
        profile: leave a trace of some steps in `profile/`.

    Returns:
        The folder of its best checkpoint.

    Raises:
        InputError: there is no mashup to start from, or nothing left to train and so to profile.
    """
    chosen = init or run.folder.read_json("selection.json")["verdict"]
    if chosen == "mashup" and not run.folder.exists("mashup"):
        raise InputError(f"{run.folder.uri}: there is no mashup to start from (the selection chose the base); use --init base")
    settings = run.config.train
    given = {name: [value] for name, value in {"learning_rates": lr, "seeds": seed}.items() if value is not None}
    settings = checked(TrainConfig, settings.model_dump() | given, "mashup train")
    arm = Arm(chosen, settings.learning_rates[0], settings.seeds[0])
    run.progress.stage("train")
    run.start_ray()
    job = make_jobs(run, [arm], lora)[0]
    if profile:
        job = _profiled(run, job)
    outcome = train_arms([job], run.folder.sub("train"), run.progress.say, run.folder.uri, run.config.track)[0]
    return run.folder.sub("train", outcome["checkpoint"]).uri


def _profiled(run: Run, job: Job) -> Job:
    if run.folder.is_complete(f"train/{job.name}/{RESULT_FILE}"):
        raise InputError(f"{run.folder.uri}: {job.arm.name} is trained already; profile another --lr or --seed")
    folder = run.folder.sub("profile")
    run.progress.say(f"trace of the first steps: {folder.uri}/{job.trace}")
    return replace(job, profile=folder)


def _summary(run: Run, choice: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    overhead = {stage: run.ledger.seconds(stage) for stage in OVERHEAD}
    total = sum(overhead.values())
    for init, arm in result["inits"].items():
        if run.folder.exists(made := f"starts/{init}/{SECONDS_FILE}"):
            arm["start_seconds"] = run.folder.read_json(made)
    best = result["inits"][best_init(result["inits"])]
    copy_weights(run.folder.sub(*best["checkpoint"].split("/")), run.folder.sub("finetuned"))
    return {
        "verdict": choice["verdict"],
        "why": choice["why"],
        "donors": [donor["adapter_id"] for donor in choice["donors"]],
        "recipe": choice["recipe"]["name"] if choice["recipe"] else None,
        **({"metric": result["metric"]} if "metric" in result else {}),
        "inits": result["inits"],
        "parity": with_overhead(result["parity"], total) if "parity" in result else None,
        **({"hedge": result["hedge"]} if "hedge" in result else {}),
        "overhead_seconds": {**overhead, "total": total},
        **_reused(run),
        "adapter": run.folder.sub("finetuned").uri,
        "note": "Seconds of training leave evaluation and start-up out for every init alike; overhead is the wall-clock of "
        "index, samples, search over all candidates and merge, engine start included.",
    }


def _reused(run: Run) -> dict[str, Any]:
    """Scores that the search found made, so that their time is not in the overhead."""
    details = run.ledger.records.get("search", {}).get("details", {})
    reused = details.get("reused_samples")
    return {"scores_reused": {"count": reused, "of": details["used_samples"]}} if reused else {}


def _said_and_timed(run: Run) -> Callable[[str], None]:
    def say(text: str) -> None:
        run.progress.say(text)
        run.ledger.beat()

    return say
