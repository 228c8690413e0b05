"""The lock among real processes, on a local disk and on an S3 server: never two holders, and the dead do not hold it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_server import StoreServer

from pipeline.core import lock as lock_module
from pipeline.core.lock import Lock, LockLostError, LockTakenError
from pipeline.core.processes import this_process
from pipeline.core.storage import Folder

CONTENDER = """
import os, random, sys, time
from pipeline.core.lock import Lock, LockTakenError
from pipeline.core.storage import Folder

place, witness = sys.argv[1:]
held = 0
while held < 3:
    try:
        with Lock(Folder.at(place)) as lock:
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))  # fails where another process is here
            time.sleep(0.02)
            os.unlink(witness)
            lock.check()
            held += 1
    except LockTakenError:
        time.sleep(random.random() / 10)
"""

SLEEPER = """
import sys
from pipeline.core.lock import Lock
from pipeline.core.storage import Folder

with Lock(Folder.at(sys.argv[1]), expiry=1) as lock:
    print("held", flush=True)
    sys.stdin.readline()
    lock.check()
"""


ELSEWHERE = {"host": "far", "process": 7, "machine": "another", "started": "1", "since": "then"}


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder.at(tmp_path / "lock")
    return Folder.at(f"{request.getfixturevalue('bucket')}/lock")


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock in `tmp_path`/lock and checks it once it is told to."""
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def be_there(folder: Folder, about: dict[str, Any]) -> None:
    """What a process that holds the lock has there."""
    folder.write_text("beat.other", "")
    folder.write_json("number.000000001.other", about)


def take_when_expired(folder: Folder) -> int:
    """Take and leave the lock, treating who is silent for a second as dead. Gives how often it was refused before."""
    refused = 0
    while True:
        try:
            with Lock(folder, expiry=1):
                return refused
        except LockTakenError:
            refused += 1


def test_of_several_processes_one_holds_it(folder: Folder, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, folder.uri, str(tmp_path / "witness")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert folder.list_files() == []


def test_who_comes_second_is_told_who_is_there(folder: Folder) -> None:
    with Lock(folder), pytest.raises(LockTakenError, match=rf"since 20.* UTC \(process {os.getpid()} on "), Lock(folder):
        pass
    with Lock(folder) as again:
        again.check()
    assert folder.list_files() == []


def test_an_error_releases_it(folder: Folder) -> None:
    with pytest.raises(SystemExit), Lock(folder):
        raise SystemExit
    with Lock(folder):
        pass


def test_what_a_dead_process_left_is_removed(folder: Folder) -> None:
    for name in ("beat.dead", "number.000000007.dead", "beat.early", "choosing.early"):
        folder.write_json(name, {"host": "gone", "process": 1, "since": "then"})
    folder.delete("choosing.early")  # else the next line waits for its number
    with pytest.raises(LockTakenError, match=r"since then \(process 1 on gone\)"), Lock(folder):
        pass
    folder.write_json("choosing.early", {})
    take_when_expired(folder)
    assert folder.list_files() == []


def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".0123456789abcdef.partial").write_text("")
    with Lock(Folder.at(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".0123456789abcdef.partial"]


def test_a_process_that_slept_has_lost_it(sleeper: subprocess.Popen[str], tmp_path: Path) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    take_when_expired(Folder.at(tmp_path / "lock"))
    sleeper.send_signal(signal.SIGCONT)
    _, errors = sleeper.communicate("go on\n")
    assert sleeper.returncode == 1
    assert LockLostError.__name__ in errors


def test_a_process_that_works_keeps_it(sleeper: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "lock")
    beat = next(name for name in folder.list_files() if name.startswith("beat."))
    seen: set[float | None] = set()
    while len(seen) < 4:  # each time written anew
        seen.add(folder.modified(beat))
    with pytest.raises(LockTakenError), Lock(folder):
        pass
    _, errors = sleeper.communicate("go on\n")
    assert sleeper.returncode == 0, errors


def test_nobody_goes_on_while_another_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two come at once and take the same number: the one with the smaller id is first, however long it took to write it."""
    folder = Folder.at(tmp_path)
    folder.write_text("beat.0", "")
    folder.write_text("choosing.0", "")
    waited: list[float] = []

    def other_chooses(seconds: float) -> None:
        waited.append(seconds)
        folder.write_json("number.000000001.0", {"host": "h", "process": 2, "since": "now"})
        folder.delete("choosing.0")

    monkeypatch.setattr(lock_module.time, "sleep", other_chooses)
    with pytest.raises(LockTakenError, match="process 2 on h"), Lock(folder):
        pass
    assert len(waited) == 1


def test_who_was_given_up_while_choosing_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others removed its mark, so that they do not know the number it took."""
    folder = Folder.at(tmp_path)
    write = Folder.write_json

    def slept_before_its_number(self: Folder, name: str, value: Any) -> None:
        if name.startswith("number."):
            for other in self.list_files():
                self.delete(other)
        write(self, name, value)

    monkeypatch.setattr(Folder, "write_json", slept_before_its_number)
    with pytest.raises(LockLostError), Lock(folder):
        pass
    assert folder.list_files() == []


HOLDER = """
import sys, time
from pipeline.core.lock import Lock
from pipeline.core.storage import Folder

with Lock(Folder.at(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("reaped", [True, False])
def test_who_is_killed_on_this_machine_holds_it_no_longer(folder: Folder, reaped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder.uri], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockTakenError, match=f"process {holder.pid} on "), Lock(folder, say=print):
            pass
        holder.kill()
        if reaped:
            holder.wait()
        else:
            assert holder.stdout.readline() == ""  # it is dead, and its number is still taken
        with Lock(folder):
            pass
    assert folder.list_files() == []


def test_the_number_of_a_dead_process_may_be_that_of_another_one(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    be_there(folder, {**this_process(), "started": "1", "since": "then"})
    with Lock(folder):
        pass
    be_there(folder, {**this_process(), "since": "then"})
    with pytest.raises(LockTakenError), Lock(folder, say=print):
        pass


def test_who_may_be_dead_elsewhere_is_waited_for_and_that_is_said(folder: Folder) -> None:
    be_there(folder, ELSEWHERE)
    said: list[str] = []
    with Lock(folder, expiry=2, say=said.append) as lock:
        lock.check()
    assert len(said) == 1
    assert re.fullmatch(r"process 7 on far worked here, and may be dead: waiting -?\d s for a sign of life", said[0])
    assert folder.list_files() == []


def test_who_gives_a_sign_of_life_elsewhere_keeps_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    be_there(folder, ELSEWHERE)
    began, seen = folder.modified("beat.other"), list[str]()

    def beat(seconds: float) -> None:
        while folder.modified("beat.other") == began:  # a store's times may be whole seconds
            folder.write_text("beat.other", "")

    monkeypatch.setattr(lock_module.time, "sleep", beat)
    with pytest.raises(LockTakenError, match=r"since then \(process 7 on far\)"), Lock(folder, say=seen.append):
        pass
    assert len(seen) == 1
    assert [name for name in folder.list_files() if not name.endswith(".other")] == []


@pytest.mark.timeout(120)
def test_who_hangs_for_longer_than_the_deadline_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process lives, and so does the thread that beats."""
    folder = Folder.at(tmp_path)
    monkeypatch.setattr(lock_module, "DEADLINE", 0)
    with Lock(folder, expiry=1) as hanging:
        assert take_when_expired(folder) > 0
        with pytest.raises(LockLostError):
            hanging.check()


def test_who_hung_and_was_passed_by_nobody_holds_it_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(tmp_path)
    with Lock(folder, expiry=0.2) as hanging:
        (beat,) = tmp_path.glob("beat.*")
        os.utime(beat, (1, 1))
        hanging.check()
        while beat.stat().st_mtime == 1:  # it gets on, and beats again
            pass
        hanging.check()


def test_a_store_that_is_away_at_the_end_hides_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: Folder, name: str) -> None:
        raise OSError("away")

    with Lock(Folder.at(tmp_path)) as lock:
        monkeypatch.setattr(Folder, "delete", away)
        lock.check()


def test_it_costs_few_requests(bucket: str, store_server: StoreServer) -> None:
    """Of a command; a beat and a check besides are one each."""
    folder = Folder.at(f"{bucket}/lock")
    begun = len(store_server.requests)
    with Lock(folder) as lock:
        entered = len(store_server.requests)
        lock.check()
        assert len(store_server.requests) - entered == 1
    assert len(store_server.requests) - begun <= 32
