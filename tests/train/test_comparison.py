"""The stage `compare`, and one arm by `mashup train`: what they refuse. What a comparison finds: tests/train/test_curves.py, and
tests/test_run.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, TargetConfig
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.core.tables import METRIC_ROWS
from pipeline.run_folder import Run
from pipeline.train import comparison
from pipeline.train.arm import Arm, Lora
from pipeline.train.metric import Measured
from pipeline.train.starts import make_jobs

LORA = Lora(4, 8.0, ("q_proj", "v_proj"))


@pytest.fixture
def run(tiny_base: str, data: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """After a merge that chose the base."""
    made = Run(Config(run=str(tmp_path), base=tiny_base, pool="pool", target=TargetConfig(train="train.jsonl")))
    for split in ("train", "validation", "test"):
        made.folder.write_bytes(f"data/{split}.parquet", data.read_bytes(f"{split}.parquet"))
    made.folder.write_json("selection.json", {"verdict": "base", "donors": [], "recipe": None})
    monkeypatch.setattr(made, "start_ray", lambda: None)
    return made


def test_what_a_metric_finds_stands_beside_the_test_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = METRIC_ROWS.empty_table()
    asked: list[Any] = []

    def measure(metric: str, job: Any, arms: Any, storage: Folder) -> Measured:
        asked.append((metric, job, {init: [arm["name"] for arm in chosen] for init, chosen in arms.items()}, storage.uri))
        return Measured({"base": [0.25, 0.75], "mashup": [1.0]}, rows, answered=2)

    monkeypatch.setattr(comparison, "measure", measure)
    curve = {"curve": [{"step": 0, "eval_nll": 1.0}], "diverged_at": None, "lr": 1e-3}
    arms = [
        {"init": init, "name": f"{init}-{seed}", "seed": seed, **curve}
        for init, seed in (("base", 0), ("base", 1), ("mashup", 0))
    ]
    arms += [{"init": "untested", "name": "untested-0", "seed": 0, **curve}]  # as a start that a hedge stopped
    result: dict[str, Any] = {"inits": {"base": {"test_nll": 1.0}, "mashup": {"test_nll": 1.0}, "untested": {}}}
    spent = comparison._measure(run, "own:f1", "job", arms, result)  # type: ignore[arg-type]
    assert spent["metric_arms"] == 2
    assert spent["metric_seconds"] >= 0
    assert asked == [("own:f1", "job", {"base": ["base-0", "base-1"], "mashup": ["mashup-0"]}, run.folder.sub("train").uri)]
    assert result["metric"] == "own:f1"
    assert result["inits"]["base"]["test_metric"] == {"mean": 0.5, "spread": pytest.approx(0.125**0.5)}
    assert result["inits"]["untested"] == {}
    assert result["inits"]["mashup"] == {"test_nll": 1.0, "test_metric": {"mean": 1.0, "spread": None}}
    assert run.folder.read_table("metric_rows.parquet").equals(rows)


@pytest.mark.parametrize(
    ("details", "found"),
    [
        ({"used_samples": 72, "reused_samples": 40}, {"scores_reused": {"count": 40, "of": 72}}),
        ({"used_samples": 72, "reused_samples": 0}, {}),
        ({}, {}),  # of a search that was stopped in between
    ],
)
def test_the_summary_has_how_many_scores_the_search_found_made(run: Run, details: dict[str, int], found: dict[str, Any]) -> None:
    run.ledger.note("search", 1.0)
    run.ledger.records["search"]["details"] = details
    assert comparison._reused(run) == found


def test_without_a_mashup_there_is_none_to_train_from(run: Run) -> None:
    with pytest.raises(InputError, match=r"no mashup to start from .* use --init base"):
        comparison.train_one(run, LORA, "mashup", None, None)


@pytest.mark.parametrize(("lr", "seed"), [(-1.0, None), (None, -1)])
def test_a_rate_or_a_seed_that_is_none_is_named(run: Run, lr: float | None, seed: int | None) -> None:
    with pytest.raises(InputError, match=r"mashup train: (learning_rates|seeds)"):
        comparison.train_one(run, LORA, "base", lr, seed)


def test_what_is_trained_already_cannot_be_profiled(run: Run) -> None:
    settings = run.config.train
    (job,) = make_jobs(run, [Arm("base", settings.learning_rates[0], settings.seeds[0])], LORA)
    run.folder.write_text(f"train/{job.name}/result.json", json.dumps({}))
    with pytest.raises(InputError, match=r"is trained already; profile another --lr or --seed"):
        comparison.train_one(run, LORA, None, None, None, profile=True)


def test_the_arm_that_is_asked_for_is_trained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Arm] = []

    def train_arms(jobs: list[comparison.Job], *given: object) -> list[dict[str, str]]:
        trained.extend(job.arm for job in jobs)
        return [{"checkpoint": "arm/checkpoint_1"}]

    monkeypatch.setattr(comparison, "train_arms", train_arms)
    assert comparison.train_one(run, LORA, None, 5e-5, 3) == run.folder.sub("train", "arm/checkpoint_1").uri
    assert trained == [Arm("base", 5e-5, 3)]
