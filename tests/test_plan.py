"""A plan before the run, the truth after it, and a second plan that finds everything done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import plan as plan_module
from pipeline.config import Config, build_config
from pipeline.run import plan_run, run_all

WORDS = ["fox", "dog", "river", "hotel", "review", "France", "Paris", "number"]


@pytest.fixture
def config(tiny_base: str, make_adapter: Callable[..., Path], write_jsonl: Any, tmp_path: Path) -> Config:
    for seed in (1, 2):
        make_adapter(tmp_path / f"pool/{seed}", tiny_base, rank=2 * seed, seed=seed)
    (tmp_path / "pool/bad").mkdir()
    (tmp_path / "pool/bad/adapter_config.json").write_text("{}")
    rows = [{"prompt": f"{a} and {b}", "completion": b} for a in WORDS for b in WORDS]
    train = {"steps": 3, "batch_size": 8, "learning_rates": [1e-3], "evaluations": 1, "cpus_per_worker": 1}
    return build_config(
        {
            "run": str(tmp_path / "run"),
            "base": tiny_base,
            "pool": str(tmp_path / "pool"),
            "target": {"train": write_jsonl(tmp_path / "train.jsonl", rows)},
            "search": {"samples": 16, "engine": "transformers", "adapters_per_batch": 2, "cpus_per_actor": 1},
            "train": train,
        },
        "test",
    )


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_plan_then_the_run_then_a_plan_that_finds_it_done(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = plan_run(config)
    assert plan == json.loads((run / "plan.json").read_text())
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "stages.json", "catalogue.parquet", "samples.parquet", "samples.json", "data", "store", "plan.json")
    }
    assert plan["candidates"] == {"found": 3, "valid": 2, "in_the_race": 2}
    calibrated = 3 * 8  # the base and two adapters on the first samples
    assert plan["adapter_samples"] == {"all": 3 * 16, "in_store": calibrated, "at_most": 3 * 16 - calibrated}
    assert plan["arms"]["count"] == 2
    assert plan["fetch"] == {"adapters": 0, "bytes": 0, "bytes_at_most": 0}
    assert plan["engines"]["memory_bytes"]["weights"] > 0
    assert all(stage["seconds"] > 0 and stage["gpu_hours"] == 0 for stage in plan["stages"].values())
    assert plan["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"].values()))

    summary = run_all(config)
    estimate = summary["estimate"]
    kept = json.loads((run / "plan.json").read_text())
    assert kept == plan | {"truth": estimate}
    stages = json.loads((run / "stages.json").read_text())
    assert estimate["adapter_samples"] == {"estimated": 24, "true": 24, "ratio": 1.0}
    for stage in ("search", "merge", "compare"):
        found = estimate["seconds"][stage]
        assert found["estimated"] == plan["stages"][stage]["seconds"]
        assert found["true"] == pytest.approx(stages[stage]["seconds"], rel=0.1)
    assert "What was estimated before" in (run / "report.html").read_text()

    again = plan_run(config)
    assert again["adapter_samples"] == {"all": 48, "in_store": 48, "at_most": 0}
    assert again["arms"]["count"] == 0
    assert again["total"] == {"seconds": 0, "gpu_hours": 0, "thread_hours": 0}
    assert again["rates"] != plan["rates"]  # the run's own measurements count, too
