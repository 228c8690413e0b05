"""The engine of a race: an adapter that hangs it, losses that cannot be believed, a race that is broken off."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from races import run, start, work_on

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.core.tables import SCORES
from pipeline.engines import canary
from pipeline.engines.canary import EngineFaultError
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer
from pipeline.engines.transformers import TransformersScorer
from pipeline.search import actor as actor_module
from pipeline.search import engine_pool
from pipeline.search.score_store import read_failures
from pipeline.search.scoreboard import Work

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_search_that_is_broken_off_can_be_taken_up_again(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    work = work_on({name: str(folder) for name, folder in pool.items()}, samples, Folder.at(tmp_path))
    broken_off: Any = start(tiny_base, work)
    assert not next(broken_off).over
    broken_off.close()
    assert run(tiny_base, work).seen == [4] * 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_a_batch_that_an_engines_memory_does_not_hold_is_scored_in_parts_and_no_adapter_is_blamed(
    samples: pa.Table, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    candidates, told = [Candidate(name, Path(name)) for name in ("a", "b", "c")], list[str]()

    class Small:
        def __init__(self, most: int):
            self.most = most

        def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
            if len(candidates) * len(samples) > self.most:
                raise error
            pairs = [(one.adapter_id, sample, 1.0, 1, None) for one in candidates for sample in samples["sample_id"].to_pylist()]
            return pa.Table.from_arrays([pa.array(column) for column in zip(*pairs, strict=True)], SCORES.names).cast(SCORES)

    actor: Any = object.__new__(engine_pool.ScoringActor)
    actor.dispatcher = SimpleNamespace(refuse="refuse")
    monkeypatch.setattr(actor, "_tell", lambda method, fault: told.append(fault))
    for most in (7, 2, 1):
        actor.scorer = Small(most)
        scores, failures = actor._score(candidates, samples.slice(0, 5), "search")
        assert failures == {}
        for name in ("a", "b", "c"):
            mine = scores.filter(pc.equal(scores["adapter_id"], name))
            assert mine["sample_id"].to_pylist() == samples["sample_id"].to_pylist()[:5]
    actor.scorer = Small(0)
    with pytest.raises(EngineFaultError, match=r"one sample of \d+ tokens; set a smaller target.max_tokens"):
        actor._score(candidates, samples, "search")
    assert len(told) == 1


@pytest.mark.long
def test_an_adapter_that_hangs_its_engine_is_set_aside_and_no_other(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's process is ended each time, so that one which dies by itself is covered too."""

    class Impatient(engine_pool.ScoringActor):
        patience = 1.0

        def _score(self, candidates: Sequence[Candidate], samples: pa.Table, stage: str) -> tuple[pa.Table, dict[str, str]]:
            if any(candidate.adapter_id == "endless" for candidate in candidates):
                time.sleep(1000)
            return super()._score(candidates, samples, stage)

    monkeypatch.setattr(engine_pool, "ScoringActor", Impatient)
    work = work_on({"a0": str(pool["a0"]), "endless": str(pool["a1"]), "a2": str(pool["a2"])}, samples, Folder.at(tmp_path))
    assert run(tiny_base, work).seen == [4, 4, 0, 4]
    assert read_failures(work.failures) == {"endless": "the engine died, or hung, 3 times with this adapter"}


@pytest.mark.long
def test_an_engine_that_cannot_be_believed_ends_the_race_and_sets_no_adapter_aside(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(TransformersScorer):
        def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
            return super().score([replace(candidate, folder=None) for candidate in candidates], samples)

    class WithDeafEngine(engine_pool.ScoringActor):
        def _start(self, engine: str, config: EngineConfig, work: Work) -> Scorer:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(canary, "build_scorer", lambda _, config: Deaf(config))
                return super()._start(engine, config, work)

    monkeypatch.setattr(engine_pool, "ScoringActor", WithDeafEngine)
    work = work_on({name: str(folder) for name, folder in pool.items()}, samples, Folder.at(tmp_path))
    with pytest.raises(EngineFaultError, match=r"transformers failed its self-check on this base: .* changes nothing"):
        run(tiny_base, work)
    assert not work.store.files()
    assert read_failures(work.failures) == {}


@pytest.mark.long
def test_a_base_that_cannot_be_scored_ends_the_race(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    impossible = samples.set_column(2, "input_ids", pa.array([[10**6] * len(ids) for ids in samples["input_ids"].to_pylist()]))
    last = run(tiny_base, work_on({"a0": str(pool["a0"])}, impossible, Folder.at(tmp_path)))
    assert last.seen is not None
    assert last.seen[0] == 0


@pytest.mark.long
def test_a_base_that_an_engine_cannot_serve_ends_the_race_with_the_engines_reason(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithUnfitEngine(engine_pool.ScoringActor):
        def _start(self, engine: str, config: EngineConfig, work: Work) -> Scorer:
            def build(*_: Any) -> Any:
                raise InputError("base: vLLM cannot serve it; set search.engine: transformers") from ValueError("a long story")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(canary, "build_scorer", build)
                return super()._start(engine, config, work)

    monkeypatch.setattr(engine_pool, "ScoringActor", WithUnfitEngine)
    work = work_on({name: str(folder) for name, folder in pool.items()}, samples, Folder.at(tmp_path))
    with pytest.raises(InputError, match=r"^base: vLLM cannot serve it; set search\.engine: transformers$"):
        run(tiny_base, work)


def test_an_engine_that_cannot_serve_the_base_says_so_once(samples: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    told, unfit = list[Exception](), InputError("base: vLLM cannot serve it")

    def build(*_: Any) -> Any:
        raise unfit

    actor: Any = object.__new__(engine_pool.ScoringActor)
    actor.dispatcher = SimpleNamespace(refuse="refuse")
    monkeypatch.setattr(actor, "_tell", lambda method, fault: told.append(fault))
    monkeypatch.setattr(actor_module, "proven_scorer", build)
    with pytest.raises(InputError, match="cannot serve"):
        actor._start(
            "vllm", None, SimpleNamespace(samples=samples, store=SimpleNamespace(folder=Folder.at("/nowhere")), stage="search")
        )
    assert told == [unfit]
