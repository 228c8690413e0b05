"""The engine that is up before the search asks for one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from pipeline.adapters.index import index
from pipeline.adapters.pool import look_at
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.data.sample import samples
from pipeline.engines.canary import EngineFaultError
from pipeline.engines.scorer import EngineConfig, Scorer
from pipeline.run_folder import Run
from pipeline.search import engine_pool
from pipeline.search.actor import ScoringActor
from pipeline.search.early_engine import begin_early, expected_engine
from pipeline.search.engine_pool import Engines
from pipeline.search.scoreboard import Work
from pipeline.search.scoring import make_engine
from pipeline.search.search import search

ASKED = {"samples": 8, "engine": "transformers", "dtype": "float32", "adapters_per_batch": 2, "actors": 1, "cpus_per_actor": 1}


@pytest.fixture
def run(
    tiny_base: str,
    make_adapter: Callable[..., Path],
    word_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> Run:
    for number in range(3):
        make_adapter(tmp_path / "pool" / f"a{number}", tiny_base, rank=2 + number, seed=number, std=0.3)
    target = TargetConfig(train=write_jsonl(tmp_path / "train.jsonl", word_rows))
    config = Config(
        run=str(tmp_path / "run"),
        base=tiny_base,
        pool=str(tmp_path / "pool"),
        target=target,
        search=SearchConfig(**ASKED),
    )
    return Run(config)


@pytest.mark.usefixtures("ray_session")
def test_it_has_room_for_what_the_pool_declares_and_for_its_merges(run: Run) -> None:
    declared = pa.table({"adapter_id": ["a", "b"], "rank": [4, 16], "target_modules": [["q_proj"], ["v_proj", "q_proj"]]})
    expected = expected_engine(run, declared, lambda ranks: 2 * max(ranks))
    assert expected == make_engine(run, declared, 32)
    assert expected is not None
    assert (expected.max_rank, expected.target_modules) == (32, ("q_proj", "v_proj"))
    assert expected_engine(run, declared.slice(0, 0), max) is None
    vllm = run.config.search.model_copy(update={"engine": "vllm"})
    run.config = run.config.model_copy(update={"search": vllm})
    smaller = expected_engine(run, declared.set_column(1, "rank", pa.array([4, 1024])), max)
    assert smaller is not None
    assert smaller.max_rank == 4


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("room", [True, False])
def test_the_search_takes_it_where_it_has_room_and_else_starts_another(
    run: Run, room: bool, worker_logs: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started() -> int:
        return worker_logs().count("engine up")

    engines, before = Engines(run.config.search), started()
    if not room:
        monkeypatch.setattr("pipeline.search.early_engine.largest_rank", lambda run, declared, merged: 1)
    with engines.kept():
        index(run, meanwhile=lambda found: begin_early(run, engines, max, found))
        assert engines.up
        while started() == before:  # beside it the CPUs of Ray are free
            ray.get(ray.remote(num_cpus=4)(lambda: None).remote())
        samples(run)
        search(run, engines, max)
        assert started() - before == (1 if room else 2)
    assert not engines.up
    assert None not in run.folder.read_table("leaderboard.parquet")["nll"].to_pylist()
    assert run.ledger.records["search"]["details"]["engine_start_seconds"] > 0


@pytest.mark.usefixtures("ray_session")
def test_an_engine_that_cannot_be_believed_is_told_where_the_search_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsound(ScoringActor):
        def _start(self, engine: str, config: EngineConfig, work: Work) -> Scorer:
            fault = EngineFaultError("it gives NaN")
            self._refuse(fault, work.stage)
            raise fault

    monkeypatch.setattr(engine_pool, "ScoringActor", Unsound)
    engines = Engines(run.config.search)
    with engines.kept():
        index(run, meanwhile=lambda found: begin_early(run, engines, max, found))
        samples(run)
        with pytest.raises(EngineFaultError, match="it gives NaN"):
            search(run, engines, max)


@pytest.mark.usefixtures("ray_session")
def test_none_is_started_where_it_cannot_be_foretold_or_might_stand_beside_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begins(asked: Run = run) -> bool:
        engines, found = Engines(asked.config.search), look_at(asked.config.pool).found
        with engines.kept():
            begin_early(asked, engines, max, found)
            return engines.up

    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "a cluster:6379")
        assert not begins()
    for other in ({"actors": 2}, {"gpus_per_actor": 1}):
        more = run.config.search.model_copy(update=other)
        assert not begins(Run(run.config.model_copy(update={"search": more})))
    Path(run.config.target.train).write_text("no rows")
    assert not begins()
