"""Who enters the race."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import racing
from pipeline.config import build_config
from pipeline.run_folder import Run
from pipeline.search.screen import SCREEN


def test_the_screen_lets_the_best_estimates_into_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 adapters a half, without those that have no estimate; but never fewer than are scored in full anyway."""
    asked = {"run": str(tmp_path), "base": "base", "pool": "pool", "target": {"train": "train.jsonl"}}
    names = [f"a{n:02}" for n in range(40)]
    catalogue = pa.table({"adapter_id": names, "uri": names})
    estimates = [None if n < 3 else float(n) for n in range(40)]
    monkeypatch.setattr(racing, "screen_pool", lambda *_: pa.table([names, estimates], schema=SCREEN))
    samples = pa.table({"split": ["search", "holdout"]})
    for share, entrants in ((0.5, names[3:23]), (0.1, names[3:19]), (1.0, names)):
        run = Run(build_config({**asked, "search": {"screen": share}}, "test"))
        assert racing.screened(run, catalogue, samples)["adapter_id"].to_pylist() == entrants
