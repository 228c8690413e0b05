"""Nodes with their engines are lost and join in mid-search: the result is the one of a search that nothing happened to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.storage import Folder
from pipeline.search.dispatcher import IN_FLIGHT

SCRIPT = Path(__file__).with_name("three_nodes.py")
HELD = IN_FLIGHT * 2 * 2
"""Adapter-samples that an engine holds: batches of two adapters on a rung of two samples."""


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: str,
    make_adapter: Callable[..., Path],
    random_samples: Callable[..., pa.Table],
) -> Path:
    """24 adapters of differing strength, and 6 samples."""
    folder = tmp_path_factory.mktemp("world")
    for seed in range(24):
        make_adapter(folder / "pool" / f"a{seed:02}", tiny_base, rank=2, seed=seed, std=0.02 * (1 + seed))
    Folder.at(folder).write_table("samples.parquet", random_samples([40] * 6, n_search=4))
    return folder


def search(world: Path, base: str, fault: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(world), base, fault]
    # Ray Data's thread may outlive the search: it is not to join another cluster of this machine once ours is shut down.
    env = os.environ | {"RAY_ENABLE_AUTO_CONNECT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((world / fault / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(world: Path, tiny_base: str) -> dict[str, Any]:
    found = search(world, tiny_base, "none")
    assert set(found["seen"]) == {2, 4, 6}
    assert found["rows"] == sum(found["seen"])
    return found


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.xdist_group("faults")  # one undisturbed search for all
@pytest.mark.parametrize("fault", ["node", "join"])
def test_the_result_is_the_same(world: Path, tiny_base: str, undisturbed: dict[str, Any], fault: str) -> None:
    found = search(world, tiny_base, fault)
    assert found["struck"]
    assert found["seen"] == undisturbed["seen"]
    both = np.array(found["nll"]), np.array(undisturbed["nll"])
    counted = np.arange(6) < np.array(found["seen"])[:, None]
    np.testing.assert_allclose(both[0][counted], both[1][counted], rtol=1e-5)
    assert found["rows"] <= undisturbed["rows"] + 2 * HELD  # what was in flight, and started early
    if fault == "join":
        assert found["engines"] >= 2
