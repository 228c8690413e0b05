"""Joining a cluster: what answers nothing, or lets nobody in, is said soon. A head that goes away: see tests/jobs."""

import socket
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from pipeline import cluster, join
from pipeline.errors import InputError


@pytest.fixture
def server() -> Any:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {scheme}127.0.0.1:{port}"):
        cluster.connect()


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    "refusal",
    [
        ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:1"),
        AuthenticationError("Token authentication is enabled but no authentication token was found"),
    ],
)
def test_a_cluster_that_lets_nobody_in(monkeypatch: pytest.MonkeyPatch, server: int, refusal: Exception) -> None:
    def refuse(**_: Any) -> None:
        raise refusal

    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server}")
    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(InputError) as found:
        cluster.connect()
    assert str(found.value).startswith(f"RAY_ADDRESS=127.0.0.1:{server}: cannot join the Ray cluster there ({refusal.args[0]}")
    assert join.TOKEN_HINT in str(found.value)


@pytest.mark.usefixtures("no_cluster")
def test_a_cluster_that_dies_while_it_is_joined_is_not_the_users_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"

    def die(**_: Any) -> None:
        listening.close()
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "init", die)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}"):
        cluster.connect()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "auto"])
def test_what_answers_is_taken_for_a_cluster(server: int, address: str) -> None:
    join.require_answer(address.format(server))
