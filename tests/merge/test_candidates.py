"""Where merges are computed."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.resources import Resources
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.merge.build import build_on_device
from pipeline.merge.candidates import _merged
from pipeline.merge.recipes import Recipe
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines


@pytest.mark.parametrize(
    ("gpus", "up", "method", "where"),
    [
        (0, False, "dare", "here"),
        (1, False, "exact", "on a GPU"),
        (1, True, "exact", "here"),
        (1, True, "dare", "on a GPU, engines ended"),
        (1, True, "ties", "on a GPU, engines ended"),
    ],
)
def test_merges_are_computed_on_a_gpu_that_is_free_and_dense_ones_on_one_that_engines_leave(
    gpus: int, up: bool, method: str, where: str, tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, target = SearchConfig(cpus_per_actor=1.5), TargetConfig(train="train.jsonl")
    run = Run(Config(run=str(tmp_path), base=tiny_base, pool="pool", target=target, search=search))
    done: list[str] = []

    class Task:
        """Stands in for `build_on_device` as a Ray task."""

        def __init__(self, function: Any, cpus: float, gpus: int, on_held_cpus: bool):
            assert function is build_on_device
            assert (cpus, gpus) == (1.5, "auto")
            assert not on_held_cpus

        def remote(self, *given: Any) -> str:
            done.append("on a GPU")
            return "made"

    monkeypatch.setattr("pipeline.merge.candidates.worker_resources", lambda **asked: Resources(1.0, gpus, 1))
    monkeypatch.setattr("pipeline.merge.candidates.compute_task", Task)
    monkeypatch.setattr("pipeline.merge.candidates.build", lambda *given: done.append("here"))
    monkeypatch.setattr("pipeline.merge.candidates.ray.get", lambda made: made)
    monkeypatch.setattr(Engines, "up", property(lambda engines: up))
    monkeypatch.setattr(Engines, "leave_room", lambda engines: bool(up and done.append("engines ended")))
    _merged(run, Engines(run.config.search), {"one": Recipe(("a", "b"), (0.5, 0.5), method, 4)}, {"a": "a", "b": "b"})
    assert ", ".join(sorted(done, reverse=True)) == where
