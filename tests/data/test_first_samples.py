"""The first rows of a target, before its sample is drawn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.core.tables import SAMPLES
from pipeline.data import first_samples as module
from pipeline.data.first_samples import first_samples
from pipeline.data.splits import take_samples

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(20)]


@pytest.mark.usefixtures("ray_session")
def test_they_are_rows_as_the_sample_has_them(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"label": 3}, *ROWS])))
    found, config = first_samples(config_for(file), 4), config_for(file)
    assert found.schema == SAMPLES
    columns = ["input_ids", "completion_mask", "learn_mask"]
    splits = take_samples(config).training.values()
    drawn = {row["sample_id"]: row for split in splits for row in split.select(["sample_id", *columns]).to_pylist()}
    assert len(found) == 4
    assert all(row == drawn[row["sample_id"]] for row in found.select(["sample_id", *columns]).to_pylist())


def test_only_so_many_are_looked_at(tmp_path: Path, config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [*[{"label": 3}] * 5, *ROWS])))
    assert len(first_samples(config_for(tmp_path / "t.jsonl"), 4)) == 4
    monkeypatch.setattr(module, "TRIED", 7)
    assert len(first_samples(config_for(tmp_path / "t.jsonl"), 4)) == 2
