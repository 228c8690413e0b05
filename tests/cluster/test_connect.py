"""A cluster is joined or started: what answers nothing, or lets nobody in, is said soon. A lost head: see tests/jobs."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from pipeline.cluster.connect import TOKEN_HINT, connect, is_own, require_answer
from pipeline.core.errors import InputError


@pytest.fixture
def server() -> Any:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {scheme}127.0.0.1:{port}"):
        connect()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, no_cluster: None, server: int) -> Callable[[Exception], str]:
    """refusing(error): let Ray raise it on joining; gives the address."""

    def install(error: Exception) -> str:
        def refuse(**_: Any) -> None:
            raise error

        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server}")
        monkeypatch.setattr(ray, "init", refuse)
        return f"127.0.0.1:{server}"

    return install


def from_another(cause: str) -> ConnectionError:
    error = ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:1")
    error.__cause__ = RuntimeError(cause)
    return error


@pytest.mark.parametrize(
    "refusal",
    [
        from_another("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing"),
        AuthenticationError("Token authentication is enabled but no authentication token was found"),
    ],
)
def test_a_cluster_that_wants_a_token_is_the_users_error(refusing: Callable[[Exception], str], refusal: Exception) -> None:
    address = refusing(refusal)
    with pytest.raises(InputError) as found:
        connect()
    assert str(found.value).startswith(f"RAY_ADDRESS={address}: cannot join the Ray cluster there ({refusal.args[0]}")
    assert TOKEN_HINT in str(found.value)


def test_a_cluster_that_dies_while_it_is_joined_is_not_the_users_error(refusing: Callable[[Exception], str]) -> None:
    address = refusing(from_another("No node info found matching attributes: '' when trying to resolve node to connect to."))
    with pytest.raises(ConnectionError, match=f"RAY_ADDRESS={address}: cannot join the Ray cluster there"):
        connect()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "auto"])
def test_what_answers_is_taken_for_a_cluster(server: int, address: str) -> None:
    require_answer(address.format(server))


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 3), (3, 3)])
def test_ray_is_started_again_where_the_machine_was_too_busy(monkeypatch: pytest.MonkeyPatch, failures: int, starts: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) <= failures:
            raise ConnectionError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if failures == 3:
        with pytest.raises(ConnectionError, match="timed out during startup"):
            connect()
    else:
        connect()
    assert [call["address"] for call in calls] == ["local"] * starts


def test_a_cluster_is_the_runs_own_unless_its_address_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_own()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not is_own()
