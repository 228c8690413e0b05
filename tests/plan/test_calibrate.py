"""When a plan measures how fast this cluster is, and what it keeps of runs that were measured. What a calibration does:
tests/plan/test_estimate.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config, TargetConfig, TrainConfig
from pipeline.core.parts import Parts
from pipeline.core.tables import CATALOGUE
from pipeline.plan import calibrate
from pipeline.plan.costs import arm_tokens
from pipeline.run_folder import Run
from pipeline.search.engine_pool import scoring_kind
from pipeline.search.scoring import rates_of
from pipeline.train.ray_train import training_kind

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def run(tiny_base: str, tmp_path: Path) -> Run:
    return Run(Config(run=str(tmp_path), base=tiny_base, pool="pool", target=TargetConfig(train="train.jsonl")))


def test_what_was_measured_on_such_workers_is_not_measured_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    row = {"adapter_id": "one", "status": "ok", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
    catalogue = pa.Table.from_pylist([row], schema=CATALOGUE)
    monkeypatch.setattr(calibrate, "_score_a_little", lambda run, valid: measured.append("scoring"))
    monkeypatch.setattr(calibrate, "_train_a_little", lambda run, lora: measured.append("training"))
    calibrate.calibrate(run, catalogue)
    rates_of(run).keep(scoring_kind(run.config.search), {"tokens_per_second": 1.0})
    calibrate.calibrate(run, catalogue)
    rates_of(run).keep(training_kind(run.config.train), {"tokens_per_second": 1.0})
    calibrate.calibrate(run, catalogue)
    assert measured == ["scoring", "training", "training"]


def test_lengths_of_the_rows_that_an_arm_sees_count_its_tokens(run: Run, random_samples: Callable[..., pa.Table]) -> None:
    rows, train = random_samples(range(4, 84)), TrainConfig(steps=3, batch_size=4)
    run.folder.write_table("data/train.parquet", rows, row_group_rows=10)
    found = calibrate.trained_lengths(Parts(run.folder, "data/train.parquet"), train, seed=2)
    assert np.count_nonzero(found) == 12
    assert arm_tokens(found, train, 2, tokens=100) == arm_tokens(calibrate.lengths_of(rows), train, 2, tokens=100)


def test_of_a_runs_arms_the_median_is_kept(run: Run, random_samples: Callable[..., pa.Table]) -> None:
    run.folder.write_table("data/validation.parquet", random_samples([10, 20, 30]))

    def outcome(seconds: float) -> dict[str, object]:
        curve = [{"step": step, "seconds": step * seconds, "tokens": 100 * step} for step in (0, 2)]
        return {"curve": curve, "evaluation_seconds": 1.0, "fit_seconds": 30.0, "diverged_at": None}

    calibrate.keep_training_rates(run, [outcome(1.0), outcome(2.0), outcome(9.0)])
    kept = rates_of(run).recent(training_kind(run.config.train))
    assert kept == {"tokens_per_second": 50.0, "evaluation_tokens_per_second": 120.0, "start_seconds": 25.0}
