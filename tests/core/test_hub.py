"""Requests of a Hub that is busy are made again; what it has answered, or is not to be asked, is said at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import COMMIT, serve_hub

from pipeline.core import hub
from pipeline.core.errors import is_transient
from pipeline.core.hub import HubBusyError, data_place, from_hub, is_busy


class TransportError(Exception):
    """As the Hub's HTTP client calls it."""


class OfflineModeIsEnabled(ConnectionError):  # noqa: N818
    """As the Hub's library calls it."""


def caused(outer: Exception, cause: BaseException) -> Exception:
    outer.__cause__ = cause
    return outer


class UnsupportedProtocol(TransportError):  # noqa: N818
    """As the Hub's HTTP client calls it."""


BUSY = [
    TransportError("no route"),
    caused(OSError("cannot connect"), TransportError("timed out")),
    RuntimeError("Task error: CAS Client Error: Request Error: error sending request for url"),
]
NOT_BUSY = [
    UnsupportedProtocol("an endpoint without http://"),
    RuntimeError("of another library"),
    OSError("no space left"),
    caused(FileNotFoundError("not in the cache"), OfflineModeIsEnabled("HF_HUB_OFFLINE=1")),
    ValueError("no such id"),
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSES", (0, 0, 0))


@pytest.mark.parametrize("error", BUSY)
def test_a_hub_that_is_busy_is_asked_again(error: Exception) -> None:
    answers = iter([error, error, "found"])

    def ask() -> str:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    assert from_hub(ask) == "found"


def test_one_that_stays_busy_may_pass_and_is_no_verdict() -> None:
    asked = list[int]()

    def ask() -> None:
        asked.append(1)
        raise BUSY[1]

    with pytest.raises(HubBusyError, match=r"does not answer, or limits requests \(cannot connect\).*HF_HUB_OFFLINE=1") as raised:
        from_hub(ask)
    assert len(asked) == 4
    assert is_transient(raised.value)


@pytest.mark.parametrize("error", NOT_BUSY)
def test_what_the_hub_has_answered_is_raised_at_once(error: Exception) -> None:
    assert not is_busy(error)
    with pytest.raises(type(error)) as raised:
        from_hub(lambda: (_ for _ in ()).throw(error))
    assert raised.value is error


def test_an_error_that_came_while_a_busy_hub_was_dealt_with_counts_and_none_that_is_told_apart() -> None:
    meanwhile, apart = OSError("meanwhile"), OSError("told")
    meanwhile.__context__ = apart.__context__ = TransportError()
    apart.__suppress_context__ = True
    assert is_busy(meanwhile)
    assert not is_busy(apart)


PINNED = """
import sys, time
time.sleep = lambda seconds: None  # the pauses that the Hub's own library makes
from pipeline.core import hub
from pipeline.core.base_ref import pinned
from pipeline.core.errors import InputError, is_transient

hub.PAUSES = (0,)
for base in sys.argv[1:]:
    try:
        print(pinned(base))
    except (InputError, OSError) as error:
        print(type(error).__name__, is_transient(error), error)
"""


@pytest.fixture
def pinned_at(tmp_path: Path) -> Callable[..., list[str]]:
    """pinned_at(endpoint, *bases): what `pinned` gives or raises of bases on a Hub, in a process of its own."""

    def ask(endpoint: str, *bases: str) -> list[str]:  # huggingface_hub reads its settings once in a process
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", PINNED, *bases]
        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True).stdout.splitlines()

    return ask


def test_a_base_on_the_hub_is_pinned_to_its_commit_through_a_limit_of_requests(pinned_at: Callable[..., list[str]]) -> None:
    with serve_hub({"org/base": {"config.json": b"{}"}}, refused=1) as (endpoint, asked):
        found, same, none = pinned_at(endpoint, "org/base", f"org/base@{COMMIT}", "org/none")
    assert found == same == f"org/base@{COMMIT}"
    assert asked.count("config.json") <= 2
    assert none.startswith("InputError False org/none: unknown base model")


def test_a_hub_that_limits_all_requests_is_no_verdict_on_the_base(pinned_at: Callable[..., list[str]]) -> None:
    with serve_hub({"org/base": {"config.json": b"{}"}}, refused=10**6) as (endpoint, _):
        (found,) = pinned_at(endpoint, "org/base")
    assert found.startswith("HubBusyError True the Hub does not answer, or limits requests")


IDS = ("org/talk", "org/talk-v2.5", "org/talk@main", f"org/talk@{COMMIT}", "org/talk?split=train_sft", "org/talk@v1?split=dev")
PATHS = (
    "org/talk.jsonl",
    "org/t.CSV.gz",
    "talk",
    "./org/talk",
    "/org/talk",
    "~/talk",
    "a/b/c",
    "s3://org/talk",
    "hf://datasets/org/x",
)


def test_the_bare_id_of_a_data_set_is_a_place_on_the_hub() -> None:
    assert [data_place(name) for name in IDS] == [f"hf://datasets/{name}" for name in IDS]
    assert [data_place(path) for path in PATHS] == [*PATHS]


def test_what_is_on_this_machine_under_that_name_is_meant_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/talk").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_place("org/talk") == "org/talk"
    assert data_place("org/other") == "hf://datasets/org/other"
