"""The search on Ray with the transformers engine: the race's work, each piece once, whatever happens to some of it."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from races import copies, run, start, stored, work_on

from pipeline.adapters.adapter import CHANGED, hash_of
from pipeline.config import SearchConfig
from pipeline.core.errors import InputError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID, SCORES
from pipeline.engines.scorer import Candidate
from pipeline.engines.transformers import TransformersScorer
from pipeline.model.base_model import linear_shapes
from pipeline.search import engine_pool
from pipeline.search.engine_pool import (
    Engines,
    engine_config,
    engines_at_once,
    require_engine,
    scoring_dtype,
    slot_bytes,
)
from pipeline.search.race import Schedule, make_schedule
from pipeline.search.score_store import read_failures
from pipeline.search.scoreboard import RaceProgress, Work

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_engine_is_told_what_the_pool_needs() -> None:
    search = SearchConfig(adapters_per_batch=3, gpus_per_actor=0, dtype="bfloat16")
    config = engine_config("base", 16, ["v_proj", "up_proj", "q_proj"], search, max_tokens=64)
    assert (config.base, config.dtype) == ("base", "bfloat16")
    assert (config.max_rank, config.adapters_per_batch, config.max_tokens) == (16, 3, 64)
    assert config.target_modules == ("q_proj", "up_proj", "v_proj")
    assert config.tensor_parallel_size == 1


def test_a_gpu_scores_as_many_adapters_together_as_there_is_room_for(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(**asked: Any) -> int:
        return engine_config(tiny_base, 16, ["q_proj", "v_proj"], SearchConfig(**asked), max_tokens=64).adapters_per_batch

    size = slot_bytes(tiny_base, 16, ["q_proj", "v_proj"], "bfloat16")
    shapes = {name: shape for name, shape in linear_shapes(tiny_base)[0].items() if name.endswith(("q_proj", "v_proj"))}
    assert size == 2 * 16 * sum(map(sum, shapes.values()))
    assert [together(gpus_per_actor=0), together(gpus_per_actor=1)] == [4, 32]
    for room, expected in ((10.5, 10), (1, 4), (100, 32)):
        monkeypatch.setattr(engine_pool, "SLOT_BYTES", round(room * size))
        assert [together(gpus_per_actor=1), together(gpus_per_actor=0)] == [expected, 4]
        assert together(gpus_per_actor=1, adapters_per_batch=7) == 7


def test_all_engines_of_a_search_compute_in_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scoring_dtype(SearchConfig(dtype="float16")) == "float16"
    assert scoring_dtype(SearchConfig(gpus_per_actor=1)) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # here, where no engine without a GPU may see it
    for supported in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert scoring_dtype(SearchConfig(gpus_per_actor=0)) == ("bfloat16" if supported else "float32")


def test_everything_is_scored_once_over_two_runs_and_failures_stop_nothing(
    tmp_path: Path,
    tiny_base: str,
    samples: pa.Table,
    pool: dict[str, Path],
    make_adapter: Callable[..., Path],
    worker_logs: Callable[[], str],
) -> None:
    """The first run, over a part of the pool, stands for one that was killed; in the second, one adapter is now corrupt, and one
    is another than the one that was indexed."""
    uris = {name: str(folder) for name, folder in pool.items()}
    corrupt = make_adapter(tmp_path / "corrupt", tiny_base)
    (corrupt / WEIGHTS_FILE).write_bytes((corrupt / WEIGHTS_FILE).read_bytes()[:-50])
    folder = Folder.at(tmp_path)

    first = run(tiny_base, work_on({name: uris[name] for name in ("a0", "a1")}, samples, folder))
    assert first.seen == [4, 4, 4]
    assert (first.adapter_samples, first.tokens) == (12, 3 * (8 + 9 + 10 + 11))
    assert first.engines == 1
    assert first.startup > 0

    other = make_adapter(tmp_path / "other", tiny_base, rank=2)
    odd = {"corrupt": str(corrupt), "removed": str(tmp_path / "removed"), "other": str(other)}
    everything = work_on({**uris, **odd}, samples, folder)
    make_adapter(other, tiny_base, rank=2, seed=7)
    second = run(tiny_base, everything)
    assert second.seen == [4, 4, 4, 4, 4, 0, 0, 0]
    assert second.adapter_samples == 8
    failures = read_failures(everything.failures)
    assert failures.keys() == odd.keys()
    assert failures["other"] == CHANGED
    origin = r"stage=search adapter=%s node=[\d.]+/\w{8} "
    assert re.search("INFO " + origin % "-" + "engine up", worker_logs())
    assert re.search("INFO " + origin % "a0,a1" + "scored on 4 samples", worker_logs())
    assert re.search("WARNING " + origin % "corrupt" + "set aside: ", worker_logs())

    table = stored(everything)
    counts = Counter(zip(table["adapter_id"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    assert counts == {(name, f"s{n}"): 1 for name in (BASE_ID, *pool) for n in range(4)}
    third = run(tiny_base, everything)
    assert (third.adapter_samples, third.engines) == (0, 0)  # nothing to do: no engine is started

    candidates = [Candidate(BASE_ID, None), *(Candidate(name, folder) for name, folder in pool.items())]
    config = engine_config(tiny_base, 5, ["q_proj", "v_proj"], SearchConfig(dtype="float32"), max_tokens=64)
    expected = TransformersScorer(config).score(candidates, samples)["nll_sum"].to_pylist()
    known = everything.store.load(everything.candidates["adapter_hash"].to_pylist()[:5], samples)
    assert known.nll_NS.flatten().tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.long
def test_who_is_out_of_the_race_is_not_scored_further(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    """20 candidates under a budget: the first rung for all, the rest for the best; two engines, and the same result again."""
    uris = copies(pool, 5, tmp_path / "pool")
    schedule = Schedule(rungs=(2, 4), budget=2 * 21 + 2 * 10, confidence=0.99)
    work = work_on(uris, samples, Folder.at(tmp_path))
    last = run(tiny_base, work, schedule, actors=2)
    assert last.seen is not None
    assert last.seen[0] == 4
    assert set(last.seen) == {2, 4}
    assert last.adapter_samples == sum(last.seen)
    again = run(tiny_base, work_on(uris, samples, Folder.at(tmp_path / "again")), schedule)
    assert again.seen == last.seen


@pytest.mark.long
def test_all_engines_are_asked_for_at_once_and_the_first_that_is_up_begins(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three engines of three CPUs each on a node of four, of a cluster that might grow and does not: two wait to the end."""
    monkeypatch.setattr("pipeline.cluster.resources.may_grow", lambda: True)
    uris = copies(pool, 3, tmp_path / "pool")
    work = work_on(uris, samples, Folder.at(tmp_path))
    waiting, last = Counter[str](), RaceProgress()
    for last in start(tiny_base, work, actors=3, cpus_per_actor=3):  # noqa: B007 (the last one is looked at)
        actors = [actor for actor in ray._private.state.actors().values() if actor["ActorClassName"].startswith("MapWorker")]
        waiting |= Counter(actor["State"] for actor in actors)
    assert waiting["PENDING_CREATION"] >= 2
    assert waiting["ALIVE"] == 1
    assert (last.seen, last.engines) == ([4] * 13, 1)


def test_as_many_engines_are_asked_for_as_have_work_or_as_the_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node of four CPUs; two adapters a batch, and the base is one more."""

    def asked(candidates: int, **search: Any) -> int:
        return engines_at_once(SearchConfig(adapters_per_batch=2, cpus_per_actor=1, **search), candidates)

    assert [asked(0), asked(5), asked(1000), asked(1000, actors=2), asked(1000, actors=50)] == [1, 3, 4, 2, 4]
    monkeypatch.setattr("pipeline.cluster.resources.may_grow", lambda: True)
    assert [asked(0), asked(5), asked(1000), asked(1000, actors=2), asked(1000, actors=50)] == [1, 3, 16, 2, 50]


@pytest.mark.parametrize(
    ("search", "refused"),
    [
        ({"dtype": "float32", "gpus_per_actor": 1}, True),
        ({"dtype": "float32", "gpus_per_actor": 0}, False),
        ({"dtype": "auto", "gpus_per_actor": 1}, False),
        ({"dtype": "float32", "gpus_per_actor": 1, "engine": "transformers"}, False),
    ],
)
def test_a_type_that_vllm_has_no_kernels_for_is_refused_before_it_starts(
    search: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_pool, "require", lambda *wish: None)
    if refused:
        with pytest.raises(InputError, match=r"^search\.dtype: float32 .* search\.dtype: auto .* search\.engine: transformers"):
            require_engine(SearchConfig(**search))
    else:
        require_engine(SearchConfig(**search))


@pytest.mark.long
def test_engines_that_are_kept_serve_the_next_race(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], worker_logs: Callable[[], str]
) -> None:
    """Each race has its own work and may use the ids of another's; the dispatcher, in which engines wait, is lost in between."""
    search = SearchConfig(engine="transformers", dtype="float32", adapters_per_batch=2, cpus_per_actor=1, actors=1)
    engines = Engines(search)

    def race(names: dict[str, str], place: str, max_rank: int) -> tuple[Work, RaceProgress]:
        work = work_on(names, samples, Folder.at(tmp_path / place))
        everything = make_schedule(len(work.candidates), len(work.samples), 0, share=1)
        *_, last = engines.race(work, engine_config(tiny_base, max_rank, ["q_proj", "v_proj"], search, 64), everything)
        return work, last

    def started() -> int:
        return worker_logs().count("engine up")

    before = started()
    with engines.kept():
        first, last = race({"one": str(pool["a0"]), "two": str(pool["a1"])}, "first", max_rank=5)
        assert (last.seen, last.engines, last.startup > 0) == ([4, 4, 4], 1, True)
        ray.kill(engines._dispatcher, no_restart=False)
        second, last = race({"one": str(pool["a2"])}, "second", max_rank=4)
        assert (last.seen, last.engines, last.startup) == ([4, 4], 1, 0)
        assert started() == before + 1
        _, last = race({"three": str(pool["a3"])}, "third", max_rank=6)
        assert (last.seen, last.startup > 0) == ([4, 4], True)
        assert started() == before + 2
    assert engines._running is None
    oracle = TransformersScorer(engine_config(tiny_base, 5, ["q_proj", "v_proj"], search, 64))
    for work, adapter in ((first, "a0"), (second, "a2")):
        found = work.store.load([hash_of(pool[adapter])], samples).nll_NS.flatten().tolist()
        assert found == pytest.approx(oracle.score([Candidate("one", pool[adapter])], samples)["nll_sum"].to_pylist(), abs=1e-3)


@pytest.mark.long
def test_a_budget_in_seconds_ends_the_race(tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]) -> None:
    """Far more than can be scored in the time; the time runs from the engine's start, so that something is."""
    uris = copies(pool, 500, tmp_path / "pool")
    last = run(
        tiny_base, work_on(uris, samples, Folder.at(tmp_path)), Schedule(rungs=(2, 4), budget=None, confidence=0.99), seconds=2
    )
    assert last.seen is not None
    assert last.seen[0] == 4
    assert 0 < last.not_reached < 2000
    assert last.adapter_samples < 4 * 2001
    assert last.seen.count(0) == last.not_reached
    assert max(last.seen[1:]) == 4


@pytest.mark.long
def test_what_another_run_has_scored_meanwhile_is_not_scored_again(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    work = work_on({name: str(folder) for name, folder in pool.items()}, samples, Folder.at(tmp_path))
    race = start(tiny_base, work)
    next(race)  # it has begun, and no engine is up yet
    ids, losses = samples["sample_id"].to_pylist(), [7.0, 7.5, 8.0, 8.5]
    for name in ("a0", "a1", "a2"):  # a whole batch, and half of one
        scores = pa.table([["another's"] * 4, ids, losses, [2] * 4, [0] * 4], schema=SCORES)
        work.store.write(scores, {"another's": hash_of(pool[name])})
    *_, last = race
    assert last.seen == [4] * 5
    assert last.adapter_samples == 2 * 4
    assert len(stored(work)) == 5 * 4
    assert work.store.load([hash_of(pool[name]) for name in ("a1", "a2")], samples).nll_NS.tolist() == [losses] * 2


@pytest.mark.long
def test_adapters_and_scores_in_an_object_store(
    bucket: str, tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    store = Folder.at(bucket)
    store.upload(pool["a0"], "pool/a0")
    work = work_on({"a0": f"{bucket}/pool/a0", "absent": f"{bucket}/pool/absent"}, samples, store.sub("run"))
    assert run(tiny_base, work).seen == [4, 4, 0]
    assert len(stored(work)) == 8
    assert run(tiny_base, work).engines == 0
