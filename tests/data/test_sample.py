"""The stage `samples`: what is drawn of a target, and when it is drawn anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CompareConfig, Config
from pipeline.data.sample import samples
from pipeline.data.splits import split_of
from pipeline.run_folder import Run


@pytest.mark.usefixtures("ray_session")
def test_a_sample_is_drawn_once_and_anew_by_another_seed(
    config_for: Callable[..., Config], write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(60)]
    train = write_jsonl(tmp_path / "train.jsonl", [*rows, {"prompt": "and", "completion": ""}])

    def drawn(seed: int, metric: str | None = None) -> Run:
        config = config_for(train, samples=8, seed=seed)
        run = Run(config.model_copy(update={"run": str(tmp_path / "run"), "compare": CompareConfig(metric=metric)}))
        samples(run)
        return run

    run = drawn(seed=0)
    first = run.folder.read_table("samples.parquet")
    assert {split: len(split_of(first, split)) for split in ("search", "holdout")} == {"search": 6, "holdout": 2}
    counts = run.folder.read_json("samples.json")
    assert (counts["search"], counts["holdout"], counts["train"]) == (6, 2, len(run.folder.read_table("data/train.parquet")))
    assert counts["rows"]["train"] == {"used": 60, "empty completion": 1, "repeated (trained on, sampled once)": 0}
    assert "passed over: 1 x empty completion" in capsys.readouterr().err

    assert drawn(seed=0).folder.read_table("samples.parquet").equals(first)
    assert "already done" in capsys.readouterr().err
    drawn(seed=0, metric="exact_match")
    assert "already done" in capsys.readouterr().err
    assert drawn(seed=0, metric="choices").folder.read_table("samples.parquet").equals(first)
    assert "used: 60 x without a list of two choices or more, all texts" in capsys.readouterr().err
    drawn(seed=0, metric="choices_per_token")
    assert "already done" in capsys.readouterr().err
    assert not drawn(seed=1).folder.read_table("samples.parquet").equals(first)
    assert "already done" not in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_parts_of_an_attempt_that_broke_off_and_of_another_input_do_not_count(
    config_for: Callable[..., Config], write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Twice {n}?", "completion": f"{2 * n}"} for n in range(60)])

    def run_at(place: str, seed: int) -> Run:
        config = config_for(train, samples=8, seed=seed)
        return Run(config.model_copy(update={"run": str(tmp_path / place)}))

    def broken_off(*_: Any) -> None:
        raise KeyboardInterrupt

    samples(run_at("run", seed=0))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.splits._search_sample", broken_off)  # all parts are written by then
        with pytest.raises(KeyboardInterrupt):
            samples(run_at("run", seed=1))
    for seed in (0, 1):
        again, fresh = run_at("run", seed), run_at(f"fresh-{seed}", seed)
        assert not again.ledger.done("samples")
        samples(again)
        samples(fresh)
        for name in ("samples.parquet", "data/train.parquet", "data/validation.parquet", "data/test.parquet"):
            assert again.folder.read_table(name).equals(fresh.folder.read_table(name)), name
        again.folder.delete("stages.json")
        again.folder.delete("stages.backup.json")
