"""Scores drawn at random, for the store and the scoreboard; a pool and samples, for races."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.tables import SCORES


@pytest.fixture(scope="session")
def drawn_scores() -> Callable[[Sequence[str], Sequence[str], int], pa.Table]:
    """drawn_scores(adapters, samples, seed): a row a pair; the number of tokens is the sample's own."""

    def draw(adapters: Sequence[str], samples: Sequence[str], seed: int = 0) -> pa.Table:
        generator = np.random.default_rng(seed)
        tokens = {sample: 3 + place % 5 for place, sample in enumerate(samples)}
        rows = [
            {
                "adapter_id": adapter,
                "sample_id": sample,
                "nll_sum": float(generator.uniform(0.5, 3) * tokens[sample]),
                "n_tokens": tokens[sample],
                "n_correct": int(generator.integers(0, tokens[sample] + 1)),
            }
            for adapter in adapters
            for sample in samples
        ]
        return pa.Table.from_pylist(rows, schema=SCORES)

    return draw


@pytest.fixture(scope="session")
def samples(random_samples: Callable[..., pa.Table]) -> pa.Table:
    return random_samples(range(8, 12), n_search=3)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, make_adapter: Callable[..., Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pool")
    return {f"a{n}": make_adapter(folder / f"a{n}", tiny_base, rank=2 + n, seed=n, std=0.3) for n in range(4)}
