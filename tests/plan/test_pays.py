"""When a mashup pays, before anything is spent: what runs leave, and what a plan makes of it."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, SearchConfig, TargetConfig, TrainConfig
from pipeline.plan.pays import cost_of_base, foretell, keep_outcome, past_outcomes
from pipeline.run_folder import Run


def run_on(base: str, folder: Path, name: str, verdict: str, **train: Any) -> Run:
    """A run whose selection is made, on a store that all share."""
    search, target = SearchConfig(engine="transformers", store=str(folder / "store")), TargetConfig(train="t.jsonl")
    made = Run(Config(run=str(folder / name), base=base, pool="p", target=target, search=search, train=TrainConfig(**train)))
    made.folder.write_json("selection.json", {"verdict": verdict})
    return made


def arm(init: str, losses: tuple[float, ...]) -> dict[str, Any]:
    """Evaluated every 10 steps, which take 20 s."""
    curve = [{"step": 10 * place, "seconds": 20.0 * place, "eval_nll": loss} for place, loss in enumerate(losses)]
    return {"init": init, "lr": 1e-3, "seed": 0, "diverged_at": None, "curve": curve}


BASE, MASHUP = arm("base", (3.0, 2.0, 1.0)), arm("mashup", (2.0, 1.0, 0.5))


def test_a_plan_reads_what_other_runs_of_its_base_and_method_came_to(tiny_base: str, tmp_path: Path) -> None:
    won, lost = run_on(tiny_base, tmp_path, "won", "mashup"), run_on(tiny_base, tmp_path, "lost", "mashup")
    assert past_outcomes(won) == []
    keep_outcome(won, [BASE, MASHUP])
    keep_outcome(won, [BASE, MASHUP])  # once more after a resume: it is one run still
    keep_outcome(lost, [BASE, arm("mashup", (2.0, 1.8, 1.2))])
    keep_outcome(run_on(tiny_base, tmp_path, "base", "base"), [BASE])
    keep_outcome(run_on(tiny_base, tmp_path, "unasked", "mashup"), [BASE])
    keep_outcome(run_on(tiny_base, tmp_path, "hedge", "mashup"), [BASE | {"stopped_at": 10}, MASHUP])
    keep_outcome(run_on(tiny_base, tmp_path, "other", "mashup", method="full"), [BASE, MASHUP])
    new = run_on(tiny_base, tmp_path, "new", "mashup")
    found = sorted((one["verdict"], one["steps_saved"], one["time_saved"]) for one in past_outcomes(new))
    assert found == [("base", 0, 0), ("mashup", 0, 0), ("mashup", pytest.approx(0.5), pytest.approx(0.5))]
    assert len(past_outcomes(won)) == 2  # its own is no past run


def test_break_even_is_where_the_training_time_saved_equals_the_overhead() -> None:
    past = [{"verdict": "mashup", "steps_saved": 0.7, "time_saved": 0.6}, {"verdict": "base", "steps_saved": 0, "time_saved": 0}]
    found = foretell(past, overhead=60.0, base_seconds=100.0)
    assert (found["past_runs"], found["mashups"]) == (2, 1)
    assert (found["steps_saved"], found["time_saved"]) == pytest.approx((0.35, 0.3))
    even = found["break_even_seconds"]
    assert 60 + even * (1 - 0.3) == pytest.approx(even)
    assert (found["seconds"], found["seconds_saved"]) == pytest.approx((130, -0.3))


def test_without_past_runs_or_rates_nothing_is_foretold() -> None:
    assert foretell([], 60.0, 100.0) == {"past_runs": 0, "overhead_seconds": 60.0, "base_seconds": 100.0}
    past = [{"verdict": "mashup", "steps_saved": 0.7, "time_saved": 0.6}]
    assert foretell(past, None, 100.0).keys() == {
        *("past_runs", "overhead_seconds", "base_seconds", "steps_saved", "time_saved", "mashups")
    }
    assert foretell([past[0] | {"time_saved": 0.0}], 60.0, 100.0)["break_even_seconds"] is None


def test_a_verdict_to_start_from_the_base_has_its_cost(tiny_base: str, tmp_path: Path) -> None:
    run = run_on(tiny_base, tmp_path, "run", "base")
    run.ledger.note("index", 3.0)
    run.ledger.note("search", 5.0)
    assert cost_of_base(run, [BASE], ["index", "search"]) == {"verdict_cost": {"seconds": 8.0, "share_of_base": 0.2}}
    assert cost_of_base(run_on(tiny_base, tmp_path, "other", "mashup"), [BASE, MASHUP], ["index"]) == {}
