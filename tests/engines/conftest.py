"""Samples and a mixed set of adapters that every engine must score alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.tables import BASE_ID
from pipeline.engines.scorer import Candidate, EngineConfig

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rank": 9, "use_rslora": True, "targets": ["k_proj", "o_proj"]},
    "rank_pattern": {"rank": 4, "rank_pattern": {"q_proj": 12}, "alpha_pattern": {"v_proj": 3}},
    "all-linear": {"rank": 2, "targets": "all-linear"},
}


@pytest.fixture(scope="session")
def samples(random_samples: Callable[..., pa.Table]) -> pa.Table:
    return random_samples(range(9, 57, 4))


@pytest.fixture(scope="session")
def candidates(tiny_base: str, tmp_path_factory: pytest.TempPathFactory, make_adapter: Callable[..., Path]) -> list[Candidate]:
    """The base and an adapter of each kind."""
    pool = tmp_path_factory.mktemp("candidates")
    folders = {
        name: make_adapter(pool / name, tiny_base, seed=seed, std=0.3, **kind) for seed, (name, kind) in enumerate(KINDS.items())
    }
    return [Candidate(BASE_ID, None), *(Candidate(name, folder) for name, folder in folders.items())]


@pytest.fixture(scope="session")
def engine_config(tiny_base: str) -> EngineConfig:
    leaves = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    return EngineConfig(tiny_base, "float32", max_rank=12, target_modules=leaves, max_tokens=128, adapters_per_batch=2)
