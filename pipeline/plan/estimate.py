"""What a run will do and cost, before it does (`mashup run CONFIG.yaml --plan`, `plan.json`), and how far that was off.

Index and samples are done by then, as they say which candidates there are and how long the samples. All else is arithmetic on
tables, on the score store, on what the cluster holds and on rates that earlier runs, or a calibration, left beside the scores
(`pipeline/search/rates.py`). Counts are the most that there can be: a race may drop candidates early. Time is None where nobody
measured it on workers of this kind.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.adapters.catalogue import valid_adapters
from pipeline.cluster.resources import Resources, live_nodes, may_grow, worker_env
from pipeline.core.ledger import digest
from pipeline.core.parts import Parts
from pipeline.data.splits import split_of
from pipeline.engines.scorer import EngineConfig
from pipeline.merge.selection import largest_merge, most_recipes
from pipeline.model.base_model import count_parameters, fast_dtype
from pipeline.plan.calibrate import keep_training_rates, lengths_of, measuring_kind, merging_kind, metric_rows, trained_lengths
from pipeline.plan.costs import (
    Scoring,
    Training,
    against,
    arm_tokens,
    hours,
    knows_scoring,
    left_to_score,
    loads_at_most,
    measuring_seconds,
    scoring_seconds,
    total,
    training_seconds,
)
from pipeline.plan.pays import cost_of_base, foretell, keep_outcome, past_outcomes
from pipeline.report.words import duration
from pipeline.run_folder import Run
from pipeline.search.engine_pool import engines_at_once, scoring_kind, scoring_resources, slot_bytes
from pipeline.search.race import Race
from pipeline.search.rates import Rates
from pipeline.search.scoreboard import Scoreboard, Work
from pipeline.search.scoring import by_rank, largest_rank, make_engine, prepare_race, rates_of, servable
from pipeline.train.arm import RESULT_FILE, Arm, Job, pass_tokens
from pipeline.train.comparison import OVERHEAD
from pipeline.train.hedge import Hedge
from pipeline.train.ray_train import arms_at_once, training_kind, training_resources
from pipeline.train.starts import decided_at, list_arms, make_jobs, shapes_of

PLAN_FILE = "plan.json"


def write_plan(run: Run, merged: bool = False) -> dict[str, Any]:
    """Estimate what is left to be done, and keep it as `plan.json`.

    Args:
        merged: whether the merge is done for this input.
    """
    plan = estimate(run, merged)
    run.folder.write_json(PLAN_FILE, plan)
    return plan


def estimate_before_search(run: Run) -> None:
    """Keep an estimate of a run that begins, unless it has one, where earlier runs measured what it takes to make one."""
    rates, config = rates_of(run), run.config
    measured = knows_scoring(rates.recent(scoring_kind(config.search))) and rates.recent(training_kind(config.train))
    if not measured or _plan_of(run):
        return
    stages = write_plan(run)["stages"].items()
    run.progress.say("at the speed of earlier runs: " + ", ".join(f"{name} {duration(cost['seconds'])}" for name, cost in stages))


def compare_with_plan(run: Run, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """At the end of a run: keep what it measured for the next ones, and set its estimate, if there is one, against the truth.

    Returns:
        What the summary says besides: `estimate` where there was one, and what a verdict to start from the base cost.
    """
    run.ledger.beat(force=True)
    keep_training_rates(run, outcomes)
    keep_outcome(run, outcomes)
    cost = cost_of_base(run, outcomes, OVERHEAD)
    merging = run.ledger.records["merge"]
    if "race_seconds" in merging["details"]:
        seconds = max(0.0, merging["seconds"] - merging["details"]["race_seconds"])
        rates_of(run).keep(merging_kind(run.config), {"seconds": seconds}, asked=merging_kind(run.config, named=False))
    _keep_measuring(run, run.ledger.records["compare"]["details"])
    plan = _plan_of(run)
    if plan is None:
        return cost
    found = against(plan, run.ledger.records)
    run.folder.write_json(PLAN_FILE, plan | {"truth": found})
    return {"estimate": found, **cost}


def _keep_measuring(run: Run, details: Mapping[str, Any]) -> None:
    """Keep what `compare.metric` took, by the details of the comparison."""
    if arms := details.get("metric_arms"):
        measured = {"seconds_per_row": details["metric_seconds"] / (arms * metric_rows(run))}
        rates_of(run).keep(measuring_kind(run.config), measured, asked=measuring_kind(run.config, named=False))


def estimate(run: Run, merged: bool = False) -> dict[str, Any]:
    """The plan as JSON: see the module's docstring."""
    config, drawn = run.config, run.folder.read_table("samples.parquet")
    catalogue = run.folder.read_table("catalogue.parquet")
    valid, failures = valid_adapters(catalogue), run.folder.sub("failures")
    usable = servable(run, valid, failures)
    work, schedule = prepare_race(run, usable, drawn, failures)
    race = Scoreboard(work, schedule).race
    scoring, merging = _scoring(run, race, usable, drawn, merged)
    rates = rates_of(run)
    trained = rates.recent(training_kind(config.train))
    training = _training(run, merged, valid, trained)
    samples = {"all": race.nll_NS.size, "in_store": int((~np.isnan(race.nll_NS)).sum()), "at_most": left_to_score(race)}
    candidates = {"found": len(catalogue), "valid": len(valid), "in_the_race": len(usable)}
    tokens = {"search": scoring.tokens, "merge": merging.tokens, "train": round(training.arms_worth * training.tokens)}
    usual, _ = by_rank(run, usable)
    merged_rank = largest_merge(usual["rank"].to_pylist(), config.merge)
    engine = make_engine(run, usable, largest_rank(run, usual, merged_rank))
    time = _time(run, rates, trained, scoring, merging, training)
    return {
        "key": _key(run),
        "candidates": candidates,
        "adapter_samples": samples,
        "tokens": tokens,
        "fetch": to_fetch(work, race, usable),
        "load_bytes": {"search": round(scoring.load_bytes), "merge": round(merging.load_bytes)},
        "engines": {"count": scoring.engines, "memory_bytes": memory_of_engine(config.search.engine, engine, _resources(run)[0])},
        "arms": {"count": training.arms, "at_once": training.at_once},
        **time,
        "pays": _pays(run, time["stages"], training.tokens / trained["tokens_per_second"] if trained else None),
        "ledger": run.ledger.records,
    }


def _scoring(run: Run, race: Race, usable: pa.Table, drawn: pa.Table, merged: bool) -> tuple[Scoring, Scoring]:
    """What the search and what the merge have to score; a merge is taken to be as large as the mean adapter of the pool."""
    config = run.config
    mean, size = float(np.mean(lengths_of(drawn))), pc.mean(usable["bytes"]).as_py() or 0.0
    search = Scoring(
        round(left_to_score(race) * mean),
        engines_at_once(config.search, len(race.nll_NS)),
        config.search.budget.seconds or math.inf,
        loads_at_most(race) * size,
    )
    recipes = 0 if merged else most_recipes(config.merge, len(race.nll_NS) - 1)
    holdout = int(lengths_of(split_of(drawn, "holdout")).sum())
    return search, Scoring(recipes * holdout, engines_at_once(config.search, recipes), load_bytes=recipes * size)


def _training(run: Run, merged: bool, valid: pa.Table, rates: dict[str, float]) -> Training:
    """The arms that have no result yet, and what each of them reads: in passes of the size that earlier ones had in the end."""
    config, train = run.config, run.config.train
    starts: list[str] = [init for init in config.compare.inits if init != "mashup" or not merged or run.folder.exists("mashup")]
    arms = list_arms(config, starts)
    decide_at = decided_at(config, arms)
    if merged:
        arms, decide_at = _left(run, make_jobs(run, arms, shapes_of(run, valid).trained), decide_at)
    rows = Parts(run.folder, "data/train.parquet")
    validation, test = (lengths_of(run.folder.read_table(f"data/{split}.parquet")) for split in ("validation", "test"))
    tokens = int(rates.get("tokens_per_pass", pass_tokens(train, gpu=training_resources(train).gpus > 0)))
    tested = len({(None if decide_at else arm.init, arm.seed) for arm in arms})
    return Training(
        arms=len(arms),
        at_once=arms_at_once(train, len(arms)),
        tokens=float(np.mean([arm_tokens(trained_lengths(rows, train, seed), train, seed, tokens) for seed in train.seeds])),
        evaluation_tokens=int((train.evaluations + 1) * validation.sum()),
        test_tokens=int(tested * test.sum()),
        tested=tested,
        metric_rows=metric_rows(run) if config.compare.metric else 0,
        decided_after=decide_at / train.steps if decide_at else 1.0,
    )


def _left(run: Run, jobs: list[Job], decide_at: int | None) -> tuple[list[Arm], int | None]:
    """The arms that have no result yet, and where between them a hedge has still to decide."""
    storage = run.folder.sub("train")
    hedge = Hedge(jobs, storage, decide_at) if decide_at else None
    if hedge and hedge.decision:
        return [job.arm for job in jobs if not hedge.has_ended(job)], None
    return [job.arm for job in jobs if not storage.is_complete(f"{job.name}/{RESULT_FILE}")], decide_at


def _time(
    run: Run, rates: Rates, trained: dict[str, float], search: Scoring, merge: Scoring, training: Training
) -> dict[str, Any]:
    """Seconds, GPU-hours and hours of CPU threads of each stage and of all."""
    config, scoring = run.config, rates.recent(scoring_kind(run.config.search))
    merging = rates.recent(merging_kind(config)).get("seconds", 0.0) if merge.tokens else 0.0
    scored, arms = scoring_seconds(merge, scoring), training_seconds(training, trained)
    measuring = measuring_seconds(training, rates.recent(measuring_kind(config)))
    seconds = {
        "search": scoring_seconds(search, scoring),
        "merge": None if scored is None else scored + merging,
        "compare": None if arms is None else arms + measuring,
    }
    one_engine, one_worker = _resources(run)
    workers = {
        "search": (one_engine, search.engines),
        "merge": (one_engine, merge.engines),
        "compare": (one_worker, training.at_once * config.train.workers),
    }
    stages = {stage: {"seconds": spent, **hours(spent, *workers[stage])} for stage, spent in seconds.items()}
    return {
        "stages": stages,
        "total": {name: total([stage[name] for stage in stages.values()]) for name in ("seconds", "gpu_hours", "thread_hours")},
        "rates": {scoring_kind(config.search): scoring, training_kind(config.train): trained},
        "notes": _notes(run, merge.tokens and not merging, training.tested * training.metric_rows and not measuring),
    }


def _pays(run: Run, stages: dict[str, Any], base_seconds: float | None) -> dict[str, Any] | None:
    """When the mashup pays; None: it is not compared with the base."""
    if not {"base", "mashup"} <= {*run.config.compare.inits}:
        return None
    spent = [run.ledger.seconds(stage) for stage in OVERHEAD]
    overhead = total([*spent, *(stages[stage]["seconds"] for stage in OVERHEAD if stage in stages)])
    return foretell(past_outcomes(run), overhead, base_seconds)


def _notes(run: Run, merging_is_left_out: Any, metric_is_left_out: Any) -> list[str]:
    """What the estimate leaves out, or takes too high."""
    config = run.config
    notes = {
        "merging includes scoring the merges, not building them: no earlier run measured that": merging_is_left_out,
        f"compare leaves out compare.metric {config.compare.metric}: no earlier run measured that": metric_is_left_out,
        "arms may end early: train.patience": config.train.patience,
        "it is assumed that the autoscaler brings all nodes that are asked for": may_grow(),
    }
    return [note for note, holds in notes.items() if holds]


def to_fetch(work: Work, race: Race, usable: pa.Table) -> dict[str, int]:
    """Adapters that are elsewhere and lack scores, their bytes, and as many for each node: each fetches what it scores. What the
    index left in the nodes' caches is not taken off."""
    lacking = np.isnan(race.nll_NS).any(axis=1) & ~race.aside_N & (not race.over)
    uris = work.candidates["uri"].filter(pa.array(lacking))
    elsewhere = uris.filter(pc.match_substring(uris, "://"))
    size = pc.sum(usable["bytes"].filter(pc.is_in(usable["uri"], elsewhere.combine_chunks()))).as_py() or 0
    return {"adapters": len(elsewhere), "bytes": size, "bytes_at_most": size * len(live_nodes())}


def memory_of_engine(name: str, engine: EngineConfig, resources: Resources) -> dict[str, int]:
    """Bytes that an engine holds at least: the base's weights, slots for adapters of the largest rank on every module that one
    of the pool has, and on CPUs vLLM's cache. On a GPU vLLM takes most of what is left for that."""
    width = fast_dtype(engine.dtype).itemsize
    slots = engine.adapters_per_batch if name == "vllm" else 1
    cache = int(worker_env(resources)["env_vars"]["VLLM_CPU_KVCACHE_SPACE"]) << 30 if name == "vllm" and not resources.gpus else 0
    weights, adapters = (
        count_parameters(engine.base) * width,
        slots * slot_bytes(engine.base, engine.max_rank, engine.target_modules, engine.dtype),
    )
    return {"weights": weights, "adapters": adapters, "cache": cache, "total": weights + adapters + cache}


def _resources(run: Run) -> tuple[Resources, Resources]:
    """Of an engine and of a training worker."""
    return scoring_resources(run.config.search), training_resources(run.config.train)


def _key(run: Run) -> str:
    """What a plan depends on, but for what is in the store."""
    asked = run.config.model_dump(include={"search", "merge", "train", "compare"})
    return digest(run.ledger.key("index"), run.ledger.key("samples"), asked)


def _plan_of(run: Run) -> dict[str, Any] | None:
    """The plan that was made for what is asked now."""
    plan: dict[str, Any] | None = run.folder.read_json(PLAN_FILE) if run.folder.exists(PLAN_FILE) else None
    return plan if plan and plan["key"] == _key(run) else None
