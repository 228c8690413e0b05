"""Progress: lines on standard error, and not too many of them."""

import os
import subprocess
import sys
from typing import Any

import pytest
from nodes import descendants, kill

from pipeline.core.progress import Progress, got_on, quiet_libraries, standstill


def test_a_counter_says_its_first_and_its_last_step_and_little_between(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.stage("search")
    for done in range(1, 101):
        progress.count(done, 100, "adapters [scored]")
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert written.out == ""
    assert 2 <= len(lines) <= 4
    assert "search" in lines[0]
    assert lines[-1].endswith("100 of 100 adapters [scored]")


def test_a_line_is_not_repeated_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is offered every second for a minute, a line at first and one half a minute later; a new text in between."""
    clock = 1000.0
    monkeypatch.setattr("pipeline.core.progress.time.monotonic", lambda: clock)
    progress = Progress()
    for second in range(60):
        clock = 1000.0 + second
        progress.now_and_then("5 scored" if second < 50 else "9 scored")
    lines = [line.split()[-2] for line in capsys.readouterr().err.strip().splitlines()]
    assert lines == ["5", "5", "9"]


def test_a_new_line_is_a_step_and_the_same_one_again_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race that hangs is looked at all the time, and the line is said again now and then."""
    clock, progress = 1000.0, Progress()
    monkeypatch.setattr("pipeline.core.progress.time.monotonic", lambda: clock)
    got_on()
    for second in range(100):
        clock = 1000.0 + second
        progress.now_and_then("5 scored" if second < 10 else "9 scored")
    assert standstill() == 89.0
    progress.say("9 scored")
    assert standstill() == 89.0
    progress.say("10 scored")
    assert standstill() == 0.0


STOPPED = """
import os, signal, sys, time
from pipeline.core.progress import exit_when_stopped
exit_when_stopped()
if "ray" in sys.argv:
    from pipeline.cluster.connect import connect
    connect()
try:
    print("at work", flush=True)
    time.sleep(60)
except SystemExit as ending:
    assert ending.code == signal.SIGTERM
    time.sleep(4)  # longer than Ray would leave it
    print("put down", flush=True)
    os._exit(1)
"""


@pytest.mark.parametrize("at", ["start", "ray"])
def test_who_is_stopped_has_time_to_put_down_where_it_is(at: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([sys.executable, "-c", STOPPED, at], stdout=subprocess.PIPE, text=True, env=environment)
    family: list[Any] = []
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "at work\n":
            assert process.poll() is None
        family = descendants(process.pid)
        process.terminate()
        assert process.communicate(timeout=60)[0] == "put down\n"
        assert process.returncode == 1
    finally:
        for one in [process, *family]:
            kill(one.pid)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 15), ("SIGINT", -2)])
def test_a_signal_that_comes_while_a_callback_runs_is_not_lost(number: str, code: int) -> None:
    """Python ignores what is raised in the callback of a weak reference."""
    script = f"""
import os, signal, time, weakref
from pipeline.core.progress import exit_when_stopped
signal.signal(signal.SIGINT, signal.default_int_handler)
exit_when_stopped()
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{number}))
del thing
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == code
    assert "Exception ignored" not in done.stderr


def test_threads_do_not_spin_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_WAIT_POLICY": given})
        quiet_libraries()
        assert os.environ["OMP_WAIT_POLICY"] == expected


STOPPED_BESIDE_A_CRASH = """
import atexit, os, signal, sys
from pipeline.core.progress import end_stopped, exit_when_stopped
exit_when_stopped()
atexit.register(print, "what Ray registers has run", flush=True)

class Thread:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGKILL)  # as one does that is at work when the interpreter ends

left = Thread()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except SystemExit:
    end_stopped(1)
"""


def test_a_command_that_is_stopped_has_its_own_exit_code_whatever_the_interpreters_end_meets() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED_BESIDE_A_CRASH], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "what Ray registers has run\n")
