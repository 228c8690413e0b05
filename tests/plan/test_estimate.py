"""A plan before the run, the truth after it, and a second plan that finds everything done."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from pipeline.cli import main
from pipeline.cluster.resources import Resources
from pipeline.config import Config, build_config
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.engines.scorer import EngineConfig
from pipeline.plan import estimate as planning
from pipeline.plan.estimate import estimate_before_search, memory_of_engine, to_fetch
from pipeline.run import plan_run, run_all
from pipeline.run_folder import LOCK, Run
from pipeline.search.batch import candidates_table
from pipeline.search.race import Race, make_schedule
from pipeline.search.scoreboard import Work

METRIC_NOTE = "compare leaves out compare.metric exact_match: no earlier run measured that"

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
            "compare": {"inits": ["base"], "metric": "exact_match"},
        },
        "test",
    )


def test_an_engine_holds_the_base_and_its_slots_for_adapters(tiny_base: str) -> None:
    """Two layers of q_proj (128 and 128 features) and down_proj (256 and 128), rank 8, three slots, two bytes a weight."""
    engine = EngineConfig(tiny_base, "bfloat16", 8, ("down_proj", "q_proj"), 64, adapters_per_batch=3)
    on_cpus = memory_of_engine("vllm", engine, Resources(1.0, 0, 2))
    assert on_cpus["adapters"] == 3 * 8 * 2 * (256 + 384) * 2
    assert on_cpus["cache"] == 1 << 30
    assert on_cpus["total"] == on_cpus["weights"] + on_cpus["adapters"] + on_cpus["cache"]
    on_gpus = memory_of_engine("vllm", engine, Resources(1.0, 1, 2))
    assert on_gpus == on_cpus | {"cache": 0, "total": on_cpus["weights"] + on_cpus["adapters"]}
    assert memory_of_engine("transformers", engine, Resources(1.0, 0, 2))["adapters"] == on_cpus["adapters"] // 3


def test_only_adapters_that_are_elsewhere_and_lack_scores_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning, "live_nodes", lambda: [{"CPU": 8.0}, {"CPU": 8.0}])
    uris = [None, "/pool/local", "s3://pool/known", "s3://pool/new", "hf://org/new"]
    candidates = candidates_table(["base", *"abcd"], uris, ["base", *"abcd"])
    catalogue = pa.table({"uri": uris[1:], "bytes": [1, 10, 100, 1000]})
    nll_NS = np.full((5, 4), np.nan, np.float32)
    nll_NS[[0, 2]] = 1.0
    run = Run(build_config({"run": str(tmp_path), "base": "b", "pool": "p", "target": {"train": "t"}}, "test"))
    work = Work(candidates, pa.table({}), None, run.folder)  # type: ignore[arg-type]
    race = Race(make_schedule(5, 3, 1, 1.0), [1] * 4, nll_NS)
    assert to_fetch(work, race, catalogue) == {"adapters": 2, "bytes": 1100, "bytes_at_most": 2200}
    race.set_aside(4)
    assert to_fetch(work, race, catalogue)["bytes"] == 100
    nll_NS[:] = 1.0
    assert to_fetch(work, Race(race.schedule, [1] * 4, nll_NS), catalogue) == {"adapters": 0, "bytes": 0, "bytes_at_most": 0}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_plan_then_the_run_then_a_plan_that_finds_it_done(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["mashup", "run", str(file), "--plan"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "48, of which 24 are in the store; at most 24 are left" in capsys.readouterr().out
    plan = json.loads((run / "plan.json").read_text())
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "stages.json", "stages.backup.json", "catalogue.parquet", "samples.parquet", "samples.json", "data"),
        *("store", "plan.json", LOCK),
    }
    assert plan["candidates"] == {"found": 3, "valid": 2, "in_the_race": 2}
    calibrated = 3 * 8  # the base and two adapters on the first samples
    assert plan["adapter_samples"] == {"all": 3 * 16, "in_store": calibrated, "at_most": 3 * 16 - calibrated}
    assert plan["arms"]["count"] == 1
    assert plan["fetch"] == {"adapters": 0, "bytes": 0, "bytes_at_most": 0}
    assert plan["engines"]["memory_bytes"]["weights"] > 0
    scoring = next(rates for kind, rates in plan["rates"].items() if kind.startswith("scoring"))
    assert scoring.keys() == {"tokens_per_second", "start_seconds", "load_seconds_per_adapter", "load_seconds_per_byte"}
    assert all(value > 0 for value in scoring.values())
    weights = [(tmp_path / f"pool/{name}/{WEIGHTS_FILE}").stat().st_size for name in ("1", "2")]
    assert plan["load_bytes"]["search"] == sum(weights)
    assert all(stage["seconds"] > 0 and stage["gpu_hours"] == 0 for stage in plan["stages"].values())
    assert plan["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"].values()))
    assert METRIC_NOTE in plan["notes"]

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

    (run / "plan.json").unlink()
    estimate_before_search(Run(config))  # as a search would: every rate is known by now
    known = json.loads((run / "plan.json").read_text())
    assert known["total"]["seconds"] > 0
    assert METRIC_NOTE not in known["notes"]
    assert known["stages"]["compare"]["seconds"] > stages["compare"]["details"]["metric_seconds"]

    again = plan_run(config)
    assert again["adapter_samples"] == {"all": 48, "in_store": 48, "at_most": 0}
    assert again["arms"]["count"] == 0
    assert again["total"] == {"seconds": 0, "gpu_hours": 0, "thread_hours": 0}
    assert again["rates"] != plan["rates"]  # the run's own measurements count, too
