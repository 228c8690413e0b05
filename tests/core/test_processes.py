"""Who a process is, and whether it has ended."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.core.processes import is_gone, may_be_seen, this_process

ABOUT = "import json, sys; from pipeline.core.processes import this_process; print(json.dumps(this_process()), flush=True)"


def test_this_one_is_there() -> None:
    assert this_process()["process"] == os.getpid()
    assert may_be_seen(this_process())
    assert not is_gone(this_process())


def test_one_that_has_ended_is_gone_before_and_after_its_parent_heard_of_it() -> None:
    with subprocess.Popen([sys.executable, "-c", f"{ABOUT}; sys.stdin.read()"], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout
        about = json.loads(process.stdout.readline())
        assert not is_gone(about)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its files are closed some moments before it has ended
        assert is_gone(about)
        process.wait()
        assert is_gone(about)


def test_another_one_of_the_same_number_does_not_stand_for_it() -> None:
    assert is_gone(this_process() | {"started": "1"})


@pytest.mark.parametrize("machine", ["another", None])
def test_of_another_machine_there_is_no_telling(machine: str | None) -> None:
    far = this_process() | {"machine": machine, "started": "1"}
    assert not may_be_seen(far)
    assert not is_gone(far)


def test_another_users_is_there_though_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_gone(this_process() | {"started": "1"})
