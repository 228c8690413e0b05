"""Measured rates: of the same kind of work on the same kind of worker, beside the scores they belong to."""

from pathlib import Path

from pipeline.rates import RECENT, Rates
from pipeline.search.store import ScoreStore


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
