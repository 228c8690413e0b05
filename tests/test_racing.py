"""Who enters the race."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import racing
from pipeline.config import build_config
from pipeline.engines.scorer import Loaded
from pipeline.errors import InputError
from pipeline.run_folder import Run
from pipeline.search.board import Progress
from pipeline.search.screen import SCREEN
from pipeline.search.store import read_failures
from pipeline.tables import SCORES

CANDIDATES = pa.schema([(name, pa.string()) for name in racing.CANDIDATE])


def asked(run: Path) -> dict[str, Any]:
    return {"run": str(run), "base": "base", "pool": "pool", "target": {"train": "train.jsonl"}}


def test_the_screen_lets_the_best_estimates_into_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 adapters a half, without those that have no estimate; but never fewer than are scored in full anyway."""
    names = [f"a{n:02}" for n in range(40)]
    catalogue = pa.table({"adapter_id": names, "uri": names})
    estimates = [None if n < 3 else float(n) for n in range(40)]
    monkeypatch.setattr(racing, "screen_pool", lambda *_: pa.table([names, estimates], schema=SCREEN))
    samples = pa.table({"split": ["search", "holdout"]})
    for share, entrants in ((0.5, names[3:23]), (0.1, names[3:19]), (1.0, names)):
        run = Run(build_config({**asked(tmp_path), "search": {"screen": share}}, "test"))
        assert racing.screened(run, catalogue, samples)["adapter_id"].to_pylist() == entrants


def test_a_race_measures_what_it_shows_and_no_more() -> None:
    """Two engines, 20 seconds each of 25. Nothing is warm where each had one batch, nothing starts where engines were kept."""
    race = Progress(tokens=900, seconds=40.0, engines=2, startup=9.0)
    assert racing.speed_of(race, 25.0) == {"start_seconds": 5.0}
    race.loaded = Loaded(adapters=4, bytes=800, seconds=2.0)
    race.warm_tokens, race.warm_seconds, race.startup = 600, 12.0, 0.0
    assert racing.speed_of(race, 25.0) == {
        "tokens_per_second": 50.0,
        "load_seconds_per_adapter": 0.5,
        "load_seconds_per_byte": 0.0025,
    }
    assert racing.speed_of(Progress(), 1.0) == {}


def test_an_adapter_that_the_engine_has_no_room_for_is_set_aside(tmp_path: Path) -> None:
    catalogue = pa.table({"adapter_id": ["small", "huge"], "rank": [8, 1024]})
    run = Run(build_config({**asked(tmp_path), "search": {"engine": "vllm"}}, "test"))
    failures = run.folder.sub("failures")
    assert racing.servable(run, catalogue, failures)["adapter_id"].to_pylist() == ["small"]
    assert read_failures(failures) == {
        "huge": "rank 1024 is above 512, the largest that vllm serves; use search.engine: transformers"
    }
    with pytest.raises(InputError, match="pool: no adapter can be scored: rank 1024 is above 512"):
        racing.servable(run, catalogue.slice(1), failures)
    run = Run(build_config({**asked(tmp_path), "search": {"engine": "transformers"}}, "test"))
    assert len(racing.servable(run, catalogue, run.folder.sub("none"))) == 2


def test_what_earlier_runs_found_to_be_good_comes_first_among_adapters_of_like_rank(
    tmp_path: Path, tiny_base: str, random_samples: Callable[..., pa.Table]
) -> None:
    drawn = random_samples([12, 14])
    run = Run(
        build_config({**asked(tmp_path), "base": tiny_base, "search": {"engine": "transformers", "dtype": "float32"}}, "test")
    )
    store = racing.make_work(
        run, pa.table({"adapter_id": [], "uri": [], "adapter_hash": []}, CANDIDATES), drawn, run.folder
    ).store
    names = ["big", "new", "poor", "good"]
    for name, nll in (("poor", 9.0), ("good", 1.0), ("big", 0.1)):
        scores = pa.table([[name], ["s0"], [nll], [5], [0]], schema=SCORES)
        store.write(scores, {name: f"hash-{name}"})
    catalogue = pa.table({"adapter_id": names, "adapter_hash": [f"hash-{name}" for name in names], "rank": [8, 4, 4, 4]})
    assert racing.in_order(run, catalogue, drawn)["adapter_id"].to_pylist() == ["good", "poor", "new", "big"]
