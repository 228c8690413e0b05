"""Folders that the processes of a node share: made once, kept while in use, and none that others could have put there."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import InputError
from pipeline.core.node_folder import obtain, private, remove, temporary_folder


def writer(made: list[Path]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "file").write_text("x")

    return write


def test_a_folder_is_made_once_and_stays_while_somebody_holds_it(tmp_path: Path) -> None:
    made = list[Path]()
    one, other = (obtain(tmp_path / "entry", writer(made)) for _ in range(2))
    assert len(made) == 1
    assert (tmp_path / "entry/file").read_text() == "x"
    os.close(one)
    assert not remove(tmp_path / "entry")
    os.close(other)
    assert remove(tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_what_one_left_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "entry.partial/files").mkdir(parents=True)
    (tmp_path / "entry.partial/files/half").touch()
    os.close(obtain(tmp_path / "entry", writer([])))
    assert [file.name for file in (tmp_path / "entry").iterdir()] == ["file"]


def test_nodes_that_share_a_disk_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    here = private(None, "rows")
    monkeypatch.setattr("socket.gethostname", lambda: "another-node")
    assert private(None, "rows") != here


def test_who_comes_meanwhile_waits_for_the_first(tmp_path: Path) -> None:
    begun, go, made, held = threading.Event(), threading.Event(), list[Path](), list[int]()

    def slow(folder: Path) -> None:
        begun.set()
        go.wait(60)
        writer(made)(folder)

    threads = [
        threading.Thread(target=lambda make=make: held.append(obtain(tmp_path / "entry", make))) for make in (slow, writer(made))
    ]
    threads[0].start()
    begun.wait(60)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(held) == 2


def test_what_could_not_be_made_is_not_there_and_is_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        obtain(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []
    obtain(tmp_path / "entry", writer([]))


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InputError, match="rows cannot be kept here, as others can write to it"):
        private(tmp_path / "open", "rows")
    assert private(tmp_path / "own", "rows").stat().st_mode & 0o777 == 0o700


def test_a_stray_file_beside_them_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stray = private(None, "temporary") / "notes.txt"
    stray.write_text("mine")
    with temporary_folder() as folder:
        assert folder.is_dir()
    assert stray.read_text() == "mine"


def test_a_temporary_folder_goes_with_its_block_and_those_of_killed_processes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = """
import os, signal
from pipeline.core.node_folder import folder_of_process, temporary_folder
(folder_of_process() / "file").touch()
with temporary_folder() as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (shared,) = tmp_path.iterdir()
    assert len(list(shared.glob("*/file"))) == 2
    with temporary_folder() as folder, temporary_folder() as other:
        assert sorted(shared.iterdir()) == sorted([folder, other])
        (folder / "file").touch()
    assert not list(shared.iterdir())


def test_what_a_process_keeps_is_there_until_it_ends(tmp_path: Path) -> None:
    code = """
from pipeline.core.node_folder import folder_of_process, temporary_folder
folder = folder_of_process()
with temporary_folder():
    pass
print(folder.is_dir() and folder == folder_of_process())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
