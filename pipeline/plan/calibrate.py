"""How fast this cluster is, for a plan: measured by real runs, and where there was none by a short calibration.

The calibration is the real thing in small: one engine scores the base and a batch of adapters on a few samples, and Ray Train
trains a few steps. Its scores are kept in the store, so that the search does not compute them again.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config, TrainConfig
from pipeline.core import tables
from pipeline.core.ledger import digest
from pipeline.core.parts import Parts
from pipeline.data.splits import split_of
from pipeline.plan.costs import knows_scoring, training_rates
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines, scoring_kind
from pipeline.search.race import Indices, make_schedule
from pipeline.search.scoring import by_rank, in_order, make_engine, make_work, race, rates_of, servable
from pipeline.train.arm import Arm, Lora
from pipeline.train.batches import row_numbers
from pipeline.train.metric import is_task
from pipeline.train.ray_train import fit, training_kind
from pipeline.train.starts import make_jobs, probed_training, shapes_of

SAMPLES = 8
"""That the calibration scores; the search begins with them, too."""

STEPS, EVALUATIONS, ROWS = 4, 2, 16
"""Of the calibration's training: the steps after the first evaluation count, and each evaluation reads so many rows."""

FOLDER = "calibration"


def calibrate(run: Run, catalogue: pa.Table) -> None:
    """Measure what no earlier run of this store measured on workers of this kind; what it took stands in the ledger beside the
    stages.

    Args:
        catalogue: the valid adapters.
    """
    started, rates, config = time.perf_counter(), rates_of(run), run.config
    if not knows_scoring(rates.recent(scoring_kind(config.search))):
        run.progress.say("no earlier run measured scoring here: a batch of adapters is scored on a few samples; this is kept")
        _score_a_little(run, catalogue)
    if not rates.recent(training_kind(config.train)):
        run.progress.say(f"no earlier run measured training here: {STEPS} steps are trained from the base")
        _train_a_little(run, shapes_of(run, catalogue).trained)
    if (seconds := time.perf_counter() - started) > 1:
        run.ledger.note("calibration", seconds)


def keep_training_rates(run: Run, outcomes: Sequence[dict[str, Any]]) -> None:
    """Keep the median of what the arms of a run measured."""
    tokens = int(lengths_of(run.folder.read_table("data/validation.parquet")).sum())
    found = [rates for outcome in outcomes if (rates := training_rates(outcome, tokens))]
    if found:
        names = set.intersection(*map(set, found))
        _keep_training(run, {name: median(rates[name] for rates in found) for name in sorted(names)})


def merging_kind(config: Config, named: bool = True) -> str:
    """What measured seconds of merging, beside scoring the merges, hold for; `named` as of `resources.describe`."""
    return f"merging, {digest(config.merge.model_dump(), probed_training(config))}, {scoring_kind(config.search, named)}"


def measuring_kind(config: Config, named: bool = True) -> str:
    """What measured seconds of `compare.metric` hold for; `named` as of `resources.describe`."""
    return f"measuring {config.compare.metric}, {training_kind(config.train, named)}"


def metric_rows(run: Run) -> int:
    """Rows that the metric is measured on; a task of lm-eval has its own, however many, and counts as one."""
    return 1 if is_task(run.config.compare.metric) else len(run.folder.read_table("data/test.parquet", ["sample_id"]))


def trained_lengths(rows: Parts, train: TrainConfig, seed: int) -> Indices:
    """Tokens of each training row that an arm of this seed sees; of the others 0."""
    lengths: Indices = np.zeros(len(rows), np.int64)
    seen = np.unique(row_numbers(0, train.steps, train.batch_size, len(rows), seed))
    parts = rows.take(seen, ["input_ids"])
    lengths[seen] = np.concatenate([lengths_of(part) for part in parts])
    return lengths


def lengths_of(rows: pa.Table) -> Indices:
    """Tokens of each row."""
    lengths: Indices = pc.list_value_length(rows["input_ids"]).to_numpy().astype(np.int64)
    return lengths


def _keep_training(run: Run, measured: dict[str, float]) -> None:
    train = run.config.train
    rates_of(run).keep(training_kind(train), measured, asked=training_kind(train, named=False))


def _score_a_little(run: Run, valid: pa.Table) -> None:
    """One sample first, with which the engine reads the adapters and compiles its kernels: scoring is what comes after that."""
    failures = run.folder.sub("failures")
    catalogue, _ = by_rank(run, servable(run, valid, failures))
    drawn = run.folder.read_table("samples.parquet")
    few = split_of(drawn, "search").slice(0, SAMPLES)
    adapters = in_order(run, catalogue, drawn)
    store = make_work(run, adapters, few, failures).store
    unknown = np.isnan(store.load(adapters["adapter_hash"].to_pylist(), few).nll_NS).all(axis=1)
    engine = make_engine(run, catalogue, max(catalogue["rank"].to_pylist()))
    batch = adapters.filter(pa.array(unknown)).slice(0, engine.adapters_per_batch)
    engines = Engines(run.config.search)
    with engines.kept():
        for samples in (few.slice(0, 1), few):
            work = make_work(run, batch, samples, failures)
            race(run, engines, work, engine, make_schedule(len(work.candidates), len(samples), 0, share=1), {})


def _train_a_little(run: Run, lora: Lora) -> None:
    train = run.config.train
    run.folder.delete(FOLDER)
    folder = run.folder.sub(FOLDER)
    validation = run.folder.read_table("data/validation.parquet").slice(0, ROWS)
    rows = Parts(run.folder, "data/train.parquet")
    first = np.arange(min(len(rows), STEPS * train.batch_size))
    folder.write_table("train.parquet", pa.concat_tables(rows.take(first, tables.SAMPLES.names)))
    folder.write_table("validation.parquet", validation)
    short = train.model_copy(update={"steps": STEPS, "evaluations": EVALUATIONS, "patience": 0})
    (job,) = make_jobs(run, [Arm("base", train.learning_rates[0], train.seeds[0])], lora)
    outcome = fit(replace(job, train=short, data=folder, key=FOLDER), folder)
    if measured := training_rates(outcome, int(lengths_of(validation).sum())):
        _keep_training(run, measured)
    run.folder.delete(FOLDER)
