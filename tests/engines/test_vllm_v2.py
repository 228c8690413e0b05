"""The fast engine with vLLM's model runner V2, which GPUs have, against the oracle: on a CPU under Triton's interpreter."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.tables import SCORES
from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.engines.transformers import TransformersScorer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install '.[cpu]'"),
    pytest.mark.xdist_group("vllm-v2"),  # one engine for all
]


@pytest.fixture(scope="module")
def score(ray_session: None, engine_config: EngineConfig) -> Iterator[Callable[..., pa.Table]]:
    """score(candidates, samples)."""
    import ray

    from pipeline.cluster.resources import Resources, worker_env
    from pipeline.engines.scorer import build_scorer

    class Engine:
        def __init__(self, config: EngineConfig):
            from types import SimpleNamespace

            import triton.backends

            # vLLM uses Triton only where it has a driver; the interpreter needs none.
            triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
            self.scorer: Any = build_scorer("vllm", config)

        def score(self, candidates: list[Candidate], samples: pa.Table) -> pa.Table:
            return self.scorer.score(candidates, samples)

        def logprobs(self) -> str:
            return type(self.scorer.logprobs).__name__

    environment = worker_env(Resources(cpus=1, gpus=0, threads=2))
    environment["env_vars"] |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    actor = ray.remote(Engine).options(num_cpus=1, runtime_env=environment).remote(engine_config)
    assert ray.get(actor.logprobs.remote(), timeout=240) == "TokenArray"
    yield lambda *work: ray.get(actor.score.remote(*work), timeout=240)
    ray.kill(actor)


def test_losses_are_those_of_the_oracle_and_first_choices_are_not_told(
    score: Callable[..., pa.Table], engine_config: EngineConfig, candidates: list[Candidate], samples: pa.Table
) -> None:
    """In batches of two, so that adapters share a batch with each other and with the base, and push each other out."""
    oracle = TransformersScorer(engine_config)
    for start in (0, 1, 3):
        batch = candidates[start : start + 2]
        found, expected = score(batch, samples), oracle.score(batch, samples)
        assert found.schema == SCORES
        assert found["n_correct"].null_count == len(found)
        told = ["adapter_id", "sample_id", "n_tokens"]
        assert found.select(told).equals(expected.select(told))
        tokens = np.array(expected["n_tokens"])
        assert np.abs(np.array(found["nll_sum"]) - np.array(expected["nll_sum"])).max() < 1e-3 * tokens.min()


def test_a_completion_with_gaps_or_from_the_first_token_on(
    score: Callable[..., pa.Table], engine_config: EngineConfig, candidates: list[Candidate], samples: pa.Table
) -> None:
    """Tokens within the completion that do not count, and a row whose first token, which nothing predicts, is in it."""
    masks = [[place % 3 != 1 for place in range(len(ids))] for ids in samples["input_ids"].to_pylist()]
    gapped = samples.set_column(samples.column_names.index("completion_mask"), "completion_mask", pa.array(masks))
    found, expected = (each(candidates[1:2], gapped) for each in (score, TransformersScorer(engine_config).score))
    assert found["n_tokens"].to_pylist() == expected["n_tokens"].to_pylist()
    assert found["nll_sum"].to_pylist() == pytest.approx(expected["nll_sum"].to_pylist(), abs=5e-3)


def test_an_adapter_that_blows_up_bends_no_other_score(
    score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    make = partial(make_adapter, tmp_path, tiny_base, std=1e30)
    wild = Candidate("wild", make(targets=["q_proj", "v_proj", "o_proj", "down_proj"]))
    expected = TransformersScorer(engine_config).score([candidates[1]], samples)["nll_sum"].to_pylist()
    together = score([wild, candidates[1]], samples)["nll_sum"].to_numpy()
    assert not np.isfinite(together[: len(samples)]).any()
    assert together[len(samples) :].tolist() == pytest.approx(expected, abs=1e-2)
    assert score([candidates[1]], samples)["nll_sum"].to_pylist() == pytest.approx(expected, abs=1e-2)
