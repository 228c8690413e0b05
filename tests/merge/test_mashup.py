"""The stage `merge`: what it needs, and what it depends on. What it chooses: tests/test_run.py."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, MergeConfig, TargetConfig, TrainConfig
from pipeline.core.errors import InputError
from pipeline.merge.mashup import merge_donors, merge_key
from pipeline.run_folder import Run


def run_on(base: str, folder: Path, merge: dict[str, Any], train: dict[str, Any]) -> Run:
    sections = {"merge": MergeConfig(**merge), "train": TrainConfig(**train)}
    return Run(Config(run=str(folder), base=base, pool="pool", target=TargetConfig(train="train.jsonl"), **sections))


def test_it_needs_the_leaderboard(tiny_base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the leaderboard is not there yet; run `mashup search` first"):
        merge_donors(run_on(tiny_base, tmp_path, {}, {}))


def test_it_depends_on_training_only_where_starts_are_probed(tiny_base: str, tmp_path: Path) -> None:
    def key(merge: dict[str, Any], **train: Any) -> str:
        run = run_on(tiny_base, tmp_path, merge, train)
        run.ledger.records["search"] = {"key": "scores"}
        return merge_key(run)

    assert key({"k": 2}) != key({"k": 3})
    assert key({"probe": 0}, steps=10) == key({"probe": 0}, steps=20)
    assert key({"probe": 2}, steps=10) != key({"probe": 2}, steps=20)
