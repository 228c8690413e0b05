"""Measured rates: of the same kind of work on the same kind of worker, beside the scores they belong to."""

from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config import SearchConfig, TrainConfig
from pipeline.search.engine_pool import scoring_kind
from pipeline.search.rates import RECENT, Rates
from pipeline.search.score_store import ScoreStore
from pipeline.train.ray_train import training_kind


def test_rates_of_another_kind_base_or_engine_are_not_used(tmp_path: Path) -> None:
    here = Rates.beside(ScoreStore.at(str(tmp_path), "base", "vllm", "bfloat16"))
    here.keep("scoring, 1 x A100", {"tokens_per_second": 9000.0})
    assert here.recent("scoring, 1 x A100") == {"tokens_per_second": 9000.0}
    assert here.recent("scoring, 2 x Xeon") == {}
    for scope in (("other", "vllm", "bfloat16"), ("base", "transformers", "bfloat16"), ("base", "vllm", "float32")):
        assert Rates.beside(ScoreStore.at(str(tmp_path), *scope)).recent("scoring, 1 x A100") == {}


def test_the_median_of_the_last_measurements_counts(tmp_path: Path) -> None:
    rates = Rates.beside(ScoreStore.at(str(tmp_path), "base", "vllm", "float32"))
    for value in (1000.0, *range(1, RECENT), 500.0):
        rates.keep("scoring", {"tokens_per_second": value})
    assert rates.recent("scoring") == {"tokens_per_second": 3.0}


def test_a_value_that_the_last_measurements_lack_is_that_of_earlier_ones(tmp_path: Path) -> None:
    rates = Rates.beside(ScoreStore.at(str(tmp_path), "base", "vllm", "float32"))
    rates.keep("scoring", {"tokens_per_second": 7.0, "start_seconds": 30.0})
    for _ in range(RECENT):
        rates.keep("scoring", {"tokens_per_second": 3.0})
    assert rates.recent("scoring") == {"tokens_per_second": 3.0, "start_seconds": 30.0}


@pytest.mark.parametrize(
    ("kind", "config"),
    [(scoring_kind, SearchConfig(gpus_per_actor=1)), (training_kind, TrainConfig(gpus_per_worker=1, workers=2))],
)
def test_a_cluster_that_starts_from_zero_finds_what_was_measured_when_its_nodes_were_up(
    kind: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with other GPUs up, it is not taken for theirs."""

    def nodes(*resources: dict[str, float]) -> None:
        total = {name: sum(node.get(name, 0) for node in resources) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in resources])

    rates, head = Rates.beside(ScoreStore.at(str(tmp_path), "base", "vllm", "bfloat16")), {"CPU": 2.0}
    nodes(head, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L40S": 1.0})
    rates.keep(kind(config), {"tokens_per_second": 9000.0}, asked=kind(config, named=False))
    assert rates.recent(kind(config)) == {"tokens_per_second": 9000.0}
    nodes(head)
    assert rates.recent(kind(config)) == {"tokens_per_second": 9000.0}
    nodes(head, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0})
    assert rates.recent(kind(config)) == {}


def test_a_speed_on_the_base_in_16_bits_is_none_of_it_in_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    assert training_kind(TrainConfig(quantize="nf4")) != training_kind(TrainConfig())
