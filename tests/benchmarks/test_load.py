"""Searches at the same time on one store lose no score, in processes of their own as under load."""

from pathlib import Path

import pytest
import ray

from benchmarks.load import load_base, search_at_once


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_two_searches_at_once_on_one_store_leave_the_same_leaderboard_and_lose_nothing(tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    found = search_at_once(tmp_path, load_base(tmp_path / "base"), address, runs=2, adapters=6, samples=8)
    assert {name: found[name] for name in ("runs_failed", "lost", "repeated", "unequal_runs")} == {
        "runs_failed": 0,
        "lost": 0,
        "repeated": 0,
        "unequal_runs": 0,
    }
    assert found["scores"] == 5 * 8  # the base and two thirds of the pool, which is small and scored in full
    assert 0 <= found["doubled"] <= found["scores"]
