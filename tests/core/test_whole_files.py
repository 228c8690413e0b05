"""Writes that are broken off, by a signal at a random moment or by an error half-way, on a disk and on an S3 server: who reads
meanwhile sees the old file or the whole new one.
"""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from store_server import StoreServer
from writers import PART, READS, WRITES, check, content, write_on

from pipeline.core import uploads
from pipeline.core.errors import is_transient
from pipeline.core.storage import Folder

FEW, KILLS = 5, int(os.environ.get("MASHUP_KILLS", "100"))
"""Of each signal, each kind of write and each place: by default, and among the long tests."""
LONGEST = 0.03
"""Seconds that a writer works before it is killed; a write takes 1 to 20 ms."""


@pytest.fixture(scope="module")
def forked() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.search.score_store", "obstore.auth.boto3"])
    return context


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    if request.param == "disk":
        return Folder.at(tmp_path / "run")
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    return Folder.at(f"{request.getfixturevalue('bucket')}/run")


@pytest.mark.timeout(60 + 3 * max(FEW, KILLS))
@pytest.mark.parametrize("kills", [FEW, pytest.param(KILLS, marks=pytest.mark.long)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("kind", WRITES)
def test_who_reads_sees_whole_versions_while_writers_are_killed(
    kind: str, number: signal.Signals, kills: int, place: Folder, forked: Any
) -> None:
    draw = random.Random(f"{kind} {number}")
    WRITES[kind](place, 0)
    looks = Looks(READS.get(kind, lambda folder: check(folder.read_bytes("file"))), place)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with looks:
        for one in range(kills):
            told, says = forked.Pipe(duplex=False)
            writer = forked.Process(target=write_on, args=(place.uri, kind, 1 + 1000 * one, environment, says))
            writer.start()
            assert told.poll(30)
            time.sleep(draw.uniform(0, LONGEST))
            os.kill(writer.pid, number)
            writer.join(30)
            assert writer.exitcode in (1, -number)
            looks.look()
    assert looks.count > kills
    if number == signal.SIGTERM:  # after a SIGKILL nobody is there to tidy up; a run sweeps, an hour later
        assert not [path for path in place.files.get_file_info(fs.FileSelector(place.path, recursive=True)) if _is_left(path)]


class Looks:
    """A reader beside the writers: one look after the other until its `with` is left; then what was wrong is raised."""

    def __init__(self, read: Callable[[Folder], None], folder: Folder):
        self._read, self._folder = read, folder
        self.count, self._wrong = 0, list[BaseException]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking)

    def look(self) -> None:
        try:
            self._read(self._folder)
        except BaseException as error:
            if is_transient(error):  # the server of a busy machine does not answer in time, and shows no version at all
                return
            self._wrong.append(error)
        self.count += 1

    def _keep_looking(self) -> None:
        while not self._ended.wait(0.002):
            self.look()

    def __enter__(self) -> "Looks":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._wrong:
            raise self._wrong[0]


def _is_left(found: fs.FileInfo) -> bool:
    return bool(found.base_name.endswith(".partial"))


def half_of(error: BaseException, is_half_way: Callable[[], bool]) -> Iterator[bytes]:
    """Three parts of a file and, once some of it is written, an error."""
    whole = content(2, 6 * PART)
    yield from (whole[start : start + PART] for start in range(0, 3 * PART, PART))
    deadline = time.monotonic() + 10
    while not is_half_way():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SystemExit(15), KeyboardInterrupt(), ValueError("x")])
def test_an_error_after_half_of_a_file_leaves_the_old_one(
    error: BaseException, place: Folder, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", PART)
    WRITES["copy_file"](place, 1)

    def is_half_way() -> bool:
        return place.is_local or any("partNumber=1" in request for request in store_server.requests)

    for name in ("file", "new"):
        store_server.requests.clear()
        with pytest.raises(type(error)) as raised:
            place.put(name, half_of(error, is_half_way))
        assert raised.value is error
        aborted = [request for request in store_server.requests if request.startswith("DELETE") and "uploadId" in request]
        assert len(aborted) == (0 if place.is_local else 1)
    assert place.read_bytes("file") == content(1, 6 * PART)
    assert [path.base_name for path in place.files.get_file_info(fs.FileSelector(place.path))] == ["file"]


def test_an_error_half_way_in_a_stream_of_rays_leaves_the_old_file(place: Folder) -> None:
    WRITES["a stream of Ray's"](place, 1)

    def half() -> None:
        with place.files.open_output_stream(place.join("file")) as stream:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(OSError, match="No space"):
        half()
    assert place.read_bytes("file") == content(1, 2_000)
