"""Nodes that do not see the paths of a run are named, with the path; each node is asked once."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from pipeline.cluster import shared_paths
from pipeline.cluster.shared_paths import SharedPaths
from pipeline.core.errors import InputError

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The driver is on no node of its cluster; gives the nodes that were asked, call by call."""
    monkeypatch.setattr(shared_paths.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "elsewhere"))
    calls, ask = [], shared_paths._ask

    def count(nodes: list[str], paths: Mapping[str, str]) -> dict[str, list[str]]:
        calls.append(nodes)
        return ask(nodes, paths)

    monkeypatch.setattr(shared_paths, "_ask", count)
    return calls


def test_a_node_that_sees_all_paths_is_asked_once_and_no_token_is_left(tmp_path: Path, asked: list[list[str]]) -> None:
    run = tmp_path / "run"
    (tmp_path / "pool").mkdir()
    run.mkdir()
    paths = SharedPaths({"pool": str(tmp_path / "pool"), "base": "org/on-the-hub", "target.test": None}, {"run": str(run)})
    for _ in range(2):
        paths.check()
    assert [len(nodes) for nodes in asked] == [1]
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("key", ["pool", "run"])
def test_a_node_with_another_disk_is_named_with_the_path(
    tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(shared_paths, "_missing", lambda paths: [one for one in paths if one == key])
    for name in ("pool", "run"):
        (tmp_path / name).mkdir()
    paths = SharedPaths({"pool": str(tmp_path / "pool")}, {"run": str(tmp_path / "run")})
    (node,) = ray.nodes()
    where = rf"{tmp_path}/{key} \({key}\): not seen from {node['NodeManagerAddress']}; give"
    with pytest.raises(InputError, match=where):
        paths.check()
    assert list((tmp_path / "run").iterdir()) == []
    assert asked == [[node["NodeID"]]]


def test_what_a_node_does_not_see_is_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    assert shared_paths._missing({"a": str(tmp_path / "there"), "b": str(tmp_path / "not")}) == ["b"]


def test_alone_or_with_object_stores_alone_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_paths, "_ask", lambda nodes, paths: pytest.fail("a node was asked"))
    SharedPaths({"pool": str(tmp_path)}, {"run": str(tmp_path)}).check()
    monkeypatch.setattr(shared_paths.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "elsewhere"))
    SharedPaths({"pool": "s3://bucket/pool"}, {"run": "s3://bucket/run", "search.store": None}).check()
