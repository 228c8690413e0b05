"""Who enters the race."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline.config import build_config
from pipeline.core.errors import InputError
from pipeline.core.tables import SCORES
from pipeline.engines.scorer import Loaded
from pipeline.run_folder import Run
from pipeline.search import scoring
from pipeline.search.engine_pool import Engines
from pipeline.search.race import Race, make_schedule
from pipeline.search.score_store import read_failures
from pipeline.search.scoreboard import RaceProgress


def asked(run: Path) -> dict[str, Any]:
    return {"run": str(run), "base": "base", "pool": "pool", "target": {"train": "train.jsonl"}}


def test_a_race_measures_what_it_shows_and_no_more() -> None:
    """Two engines, 20 seconds each of 25. Nothing is warm where each had one batch, nothing starts where engines were kept."""
    race = RaceProgress(tokens=900, seconds=40.0, engines=2, startup=9.0)
    assert scoring.speed_of(race, 25.0) == {"start_seconds": 5.0}
    race.loaded = Loaded(adapters=4, bytes=800, seconds=2.0)
    race.warm_tokens, race.warm_seconds, race.startup = 600, 12.0, 0.0
    assert scoring.speed_of(race, 25.0) == {
        "tokens_per_second": 50.0,
        "load_seconds_per_adapter": 0.5,
        "load_seconds_per_byte": 0.0025,
    }
    assert scoring.speed_of(RaceProgress(), 1.0) == {}


@pytest.mark.parametrize(("made", "said"), [(0, "nothing new was scored"), (8, "scored 8 adapter-samples, 25% of all")])
def test_the_end_of_a_race_says_what_it_scored(made: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(build_config(asked(tmp_path / "run"), "config.yaml"))
    scoring._tell(run, RaceProgress(adapter_samples=made, seen=[8] * 4), 4, 8)
    assert said in capsys.readouterr().err


def test_an_adapter_that_the_engine_has_no_room_for_is_set_aside(tmp_path: Path) -> None:
    catalogue = pa.table({"adapter_id": ["small", "huge"], "rank": [8, 1024]})
    run = Run(build_config({**asked(tmp_path), "search": {"engine": "vllm"}}, "test"))
    failures = run.folder.sub("failures")
    assert scoring.servable(run, catalogue, failures)["adapter_id"].to_pylist() == ["small"]
    assert read_failures(failures) == {
        "huge": "rank 1024 is above 512, the largest that vllm serves; use search.engine: transformers"
    }
    with pytest.raises(InputError, match="pool: no adapter can be scored: rank 1024 is above 512"):
        scoring.servable(run, catalogue.slice(1), failures)
    run = Run(build_config({**asked(tmp_path), "search": {"engine": "transformers"}}, "test"))
    assert len(scoring.servable(run, catalogue, run.folder.sub("none"))) == 2


def test_what_earlier_runs_found_to_be_good_comes_first_among_adapters_of_like_rank(
    tmp_path: Path, tiny_base: str, random_samples: Callable[..., pa.Table]
) -> None:
    drawn = random_samples([12, 14])
    run = Run(
        build_config({**asked(tmp_path), "base": tiny_base, "search": {"engine": "transformers", "dtype": "float32"}}, "test")
    )
    store = scoring.store_of(run)
    names = ["big", "new", "poor", "good"]
    for name, nll in (("poor", 9.0), ("good", 1.0), ("big", 0.1)):
        scores = pa.table([[name], ["s0"], [nll], [5], [0]], schema=SCORES)
        store.write(scores, {name: f"hash-{name}"})
    catalogue = pa.table({"adapter_id": names, "adapter_hash": [f"hash-{name}" for name in names], "rank": [8, 4, 4, 4]})
    assert scoring.in_order(run, catalogue, drawn)["adapter_id"].to_pylist() == ["good", "poor", "new", "big"]


@pytest.mark.parametrize(
    ("ranks", "apart"),
    [
        ([16] * 199 + [256], {199}),
        ([16] * 197 + [65, 256, 512], {197, 198, 199}),
        ([16] * 195 + [256] * 5, set()),  # too many: each would be scored on every sample
        ([16] * 199 + [64], set()),  # costs little
        ([64] * 199 + [128], set()),  # not far from the others
        ([64] * 199 + [256], {199}),
        ([8, 8, 8, 128], {3}),
        ([512], set()),
        ([], set()),
    ],
)
def test_outliers_are_few_far_from_the_others_and_large(ranks: list[int], apart: set[int]) -> None:
    assert {place for place, outlier in enumerate(scoring.rank_outliers(ranks)) if outlier} == apart


@pytest.mark.parametrize(("engine", "gpus", "apart"), [("vllm", 1, ["huge"]), ("vllm", 0, []), ("transformers", 1, [])])
def test_outliers_are_scored_apart_where_the_largest_rank_slows_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_samples: Callable[..., pa.Table],
    engine: str,
    gpus: int,
    apart: list[str],
) -> None:
    """By an engine that has room for them and is ended; the one of the race has the rank of the others."""
    names = [f"a{n}" for n in range(30)] + ["huge"]
    columns = {
        "adapter_id": names,
        "uri": names,
        "adapter_hash": names,
        "state": pa.nulls(31, pa.string()),
        "rank": [8] * 30 + [256],
        "target_modules": [["up_proj"]] * 31,
    }
    catalogue, drawn = pa.table(columns), random_samples([12, 14], n_search=1)
    search = {"engine": engine, "gpus_per_actor": gpus, "dtype": "float32", "adapters_per_batch": 4}
    run = Run(build_config({**asked(tmp_path), "search": search}, "test"))
    events: list[Any] = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}])
    monkeypatch.setattr(scoring, "fingerprint", lambda base: "f")
    monkeypatch.setattr(scoring, "race", lambda run, engines, work, engine, rungs, details: events.append((work, engine, rungs)))
    monkeypatch.setattr(Engines, "close", lambda self: events.append("closed"))
    usual, outliers = scoring.by_rank(run, catalogue)
    assert outliers["adapter_id"].to_pylist() == apart
    assert len(usual) == 31 - len(apart)
    assert scoring.largest_rank(run, usual) == (8 if apart else 256)
    scoring.score_outliers(run, Engines(run.config.search), outliers, drawn, run.folder.sub("failures"), {})
    if apart:
        (work, config, schedule), closed = events
        assert work.candidates["adapter_id"].to_pylist() == ["base", "huge"]
        assert (work.samples.equals(drawn), schedule.rungs, schedule.budget) == (True, (2,), None)
        assert (config.max_rank, closed) == (256, "closed")
    else:
        assert not events


def test_a_race_judges_those_that_were_scored_apart_as_if_it_had_scored_them() -> None:
    """Whoever they are, good or bad: the same candidates see the same samples, and they are given to no engine."""
    n, samples = 40, 32
    generator = np.random.default_rng(0)
    nll_NS = generator.uniform(1, 3, (n, samples)).astype(np.float32) + np.linspace(0, 1, n, dtype=np.float32)[:, None]
    schedule, tokens = make_schedule(n, 24, 8, share=0.3), [5] * samples

    def seen(apart: list[int]) -> list[int]:
        known_NS = np.full((n, samples), np.nan, np.float32)
        known_NS[apart] = nll_NS[apart]
        contest, given = Race(schedule, tokens, known_NS), set()
        while not contest.over:
            taken, places = contest.take(4)
            given.update(taken)
            for one in taken:
                contest.report(one, places, nll_NS[one, places].tolist())
        assert not given & set(apart)
        return contest.seen_N().tolist()

    assert seen([2, 39]) == seen([])
