"""Faults at random moments of whole runs: after them the same command goes on, says of every stage that was done that it is, and
ends with the tables of an undisturbed run. Pool, run folder and score store are on a disk, or in a bucket.

A seeded handful by default. `make test-faults` injects MASHUP_FAULTS of them, AT_ONCE in each test; MASHUP_FAULT_SEED draws
others.
"""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Cluster, Command, Tables
from nodes import kill
from pyarrow import fs

from pipeline.core.ledger import Ledger
from pipeline.core.storage import Folder
from pipeline.core.whole_files import PARTIAL

FAULTS = int(os.environ.get("MASHUP_FAULTS", "3"))
SEED = int(os.environ.get("MASHUP_FAULT_SEED", "0"))
AT_ONCE = 10
ALONE = 4
"""Every so many tests the commands have a Ray of their own, in the others they join a cluster that stays."""

PROCESSES = {
    "driver": lambda process, driver: process == driver,
    "scoring actor": lambda process, driver: "ScoringActor" in process.name() + " ".join(process.cmdline()),
    "dispatcher": lambda process, driver: "Dispatcher" in process.name() + " ".join(process.cmdline()),
    "training worker": lambda process, driver: "RayTrainWorker" in " ".join(process.cmdline()),
    "any worker": lambda process, driver: " ".join(process.cmdline()).startswith("ray::"),
    "node": lambda process, driver: process.name() == "raylet",
}
"""What is killed, among the driver and those that work for it."""

STORAGE = ("full", "slow", "wrong", "gone", "clock on", "clock back")
"""What the storage, or the clock, does for a while: see tests/faulty/sitecustomize.py."""

STOPPED = "stopped"
"""The driver gets a SIGTERM, as from a scheduler or from a person."""

CUT = "half a file"
"""The driver is killed, and a file that it left is cut short."""

KINDS = (*PROCESSES, *STORAGE, STOPPED, CUT)
PAUSE, HOLD = 0.25, 0.05
"""Longest pause before a fault, and longest life of what is then to be killed, as shares of what an undisturbed run takes."""
STAGES = ("index", "samples", "search", "merge", "compare")
ALREADY = "already done"
WHILE = 5.0
"""Longest seconds of a fault of the storage."""
STUCK = 600.0
"""Seconds in which a fault finds no target, or a command does not end."""


LINE = re.compile(r"^ *[0-9]+ s  (?P<stage>[a-z]+) +(?P<text>.*)$")
"""Of a run's progress."""


@dataclass(frozen=True)
class Place:
    """Where everything is that a run reads and writes: the config, and the folder that run folders are made in."""

    config: dict[str, Any]
    runs: str


@pytest.fixture(scope="module", params=["disk", pytest.param("s3", marks=pytest.mark.long)])
def place(
    request: pytest.FixtureRequest,
    write_pool: Callable[[Path], Path],
    small_config: Callable[[Path, Path], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    folder = tmp_path_factory.mktemp("faults")
    pool, short = write_pool(folder / "pool"), {"merge": {"k": 2, "weights": "equal"}, "compare": {"inits": ["mashup"]}}
    config = small_config(pool, folder) | short
    config["search"]["actors"] = 2
    if request.param == "disk":
        return Place(config, str(folder))
    request.getfixturevalue("object_store")
    Folder.at("s3://faults?allow_bucket_creation=true").create()
    bucket = Folder.at("s3://faults")
    bucket.upload(pool, "pool")
    bucket.copy_file("train.jsonl", Folder.at(folder))
    elsewhere = {"pool": "s3://faults/pool", "target": {"train": "s3://faults/train.jsonl"}}
    return Place(config | elsewhere, "s3://faults/runs")


@pytest.fixture(scope="module")
def cluster(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("cluster") / "fault")
    yield one
    one.end()


@pytest.fixture(scope="module")
def undisturbed(place: Place, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, float]:
    """The tables of a run to which nothing happens, and how many seconds it takes."""
    command = Command(place.config, tmp_path_factory.mktemp("log"), f"{place.runs}/undisturbed", cluster.flag, cluster)
    started = time.monotonic()
    command.start()
    assert command.ended(STUCK) == 0, command.log.read_text()[-3000:]
    return command.tables(), time.monotonic() - started


def _draws() -> Iterator[tuple[int, list[str]]]:
    """For each test a seed and the kinds of its faults: every kind comes in turn, in an order of the seed's."""
    draw = random.Random(SEED)
    kinds: list[str] = []
    for number, start in enumerate(range(0, FAULTS, AT_ONCE)):
        while len(kinds) < AT_ONCE:
            kinds += draw.sample(KINDS, len(KINDS))
        yield SEED * 1000 + number, [kinds.pop(0) for _ in range(min(AT_ONCE, FAULTS - start))]


@pytest.mark.long
@pytest.mark.timeout(900 + 150 * min(FAULTS, AT_ONCE))
@pytest.mark.parametrize(("seed", "kinds"), _draws(), ids=lambda value: "-".join(value) if isinstance(value, list) else None)
def test_after_faults_the_same_command_ends_with_the_same_tables(
    seed: int, kinds: list[str], cluster: Cluster, place: Place, undisturbed: tuple[Tables, float], tmp_path: Path
) -> None:
    alone = seed % ALONE == ALONE - 1
    draw, (expected, seconds) = random.Random(seed), undisturbed
    runs = Runs(draw, place, tmp_path, expected, None if alone else cluster)
    try:
        for kind in kinds:
            runs.go_on(draw.uniform(0, PAUSE * seconds))
            runs.suffer(kind, draw.uniform(0, HOLD * seconds))
        runs.finish()
    finally:
        runs.end()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_that_is_stopped_in_each_stage_goes_on_where_it_was(
    cluster: Cluster, place: Place, undisturbed: tuple[Tables, float], tmp_path: Path
) -> None:
    draw, (expected, seconds) = random.Random(SEED), undisturbed
    runs = Runs(draw, place, tmp_path, expected, cluster)
    try:
        for stage in STAGES:
            runs.reach(stage)
            runs.suffer(STOPPED, draw.uniform(0, HOLD * seconds))
        runs.finish()
        assert runs.stopped >= len(STAGES) - 1  # a short one may end before the signal comes
    finally:
        runs.end()


class Runs:
    """One command after the other: in the same run folder until the run is done, and then in a new one.

    A command that met a fault goes on, or ends and says that it can go on; one that met none must not fail. What the run's ledger
    says is done when a command ends, the next one does not do again.
    """

    def __init__(self, draw: random.Random, place: Place, folder: Path, expected: Tables, cluster: Cluster | None):
        self.draw, self.place, self.folder, self.expected, self.cluster = draw, place, folder, expected, cluster
        self.flag = cluster.flag if cluster else folder / "fault"
        self.story, self.began, self.done, self.stopped = list[str](), time.monotonic(), 0, 0
        self._begin()

    def go_on(self, seconds: float) -> None:
        """Let nothing happen for a while."""
        end = time.monotonic() + seconds
        self._watch(lambda: time.monotonic() > end)

    def reach(self, stage: str) -> None:
        """Wait until a stage works."""
        self._watch(lambda: any(line["stage"] == stage and line["text"] != ALREADY for line in self._lines()))

    def suffer(self, kind: str, later: float) -> None:
        """Let a fault come, some seconds after there is something that it can strike."""
        self._watch(lambda: bool(self._targets(kind)))
        self.go_on(later)
        self._watch(lambda: bool(self._targets(kind)))
        self._tell(kind)
        self.kept |= self._scores()
        self.met = True
        if kind in STORAGE:
            self._misbehave(kind, self.draw.uniform(1, WHILE))
        elif kind == CUT:
            self._cut(self.command.run)
        elif kind == STOPPED:
            self.command.process.terminate()
        elif targets := self._targets(kind):
            self.killed += 1
            kill(self.draw.choice(targets).pid)

    def finish(self) -> None:
        """Without a further fault, the run that is on comes to its end."""
        done = self.done
        if self.command.run.exists("config.yaml"):
            self._watch(lambda: self.done > done)

    def end(self) -> None:
        """Leave nothing that runs."""
        self.flag.unlink(missing_ok=True)
        for process in self.command.processes()[:1]:
            kill(process.pid)
            self.command.ended(60)

    def _begin(self) -> None:
        run = f"{self.place.runs}/{self.folder.name}-{self.done}"
        self.command = Command(self.place.config, self.folder / str(self.done), run, self.flag, self.cluster)
        self.met, self.killed, self.kept = False, 0, dict[str, int]()
        self.known, self.read = set[str](), 0

    def _watch(self, until: Callable[[], bool]) -> None:
        """Keep the command running until something is so."""
        deadline = time.monotonic() + STUCK
        while not until():
            assert time.monotonic() < deadline, self._told()
            if self.command.process is None:
                self.read = self.command.log.stat().st_size if self.command.log.exists() else 0
                self.command.start()
            if (code := self.command.ended(0.2)) is not None:
                self._over(code)

    def _over(self, code: int) -> None:
        self._tell(f"ended with {code}")
        assert code in (0, 1, -signal.SIGKILL, -signal.SIGTERM), self._told()
        self._require_known()
        if code:
            assert self.met, self._told()
            self.stopped += 1
            self.met = self.flag.exists()
            return
        assert self.command.tables() == self.expected, self._told()
        # Who is killed while it writes leaves the file; an hour later it is swept up.
        left = [one for one in self.command.run.files.get_file_info(_everything(self.command.run)) if _is_partial(one.base_name)]
        assert len(left) <= self.killed, self._told()
        found = self._scores()
        assert {file: found.get(file) for file in self.kept} == self.kept, self._told()
        self.done += 1
        self._begin()

    def _require_known(self) -> None:
        """The command that ended said 'already done' of each stage that was done before it, as far as it came. Once a file
        was cut that is known of no stage until a command has come to it."""
        lines = self._lines()
        reached = {line["stage"] for line in lines}
        said = {line["stage"] for line in lines if line["text"] == ALREADY}
        assert self.known & reached <= said, self._told()
        records = Ledger(self.command.run, {}).records  # as a command reads it: the file may be the one that was cut
        done = {name for name, record in records.items() if record["done"] and name in STAGES}
        self.known = done & (self.known | reached)

    def _lines(self) -> list[re.Match[str]]:
        """The progress of the command that runs, or that ended last."""
        if not self.command.log.exists():
            return []
        text = self.command.log.read_bytes()[self.read :].decode(errors="replace")
        return [line for line in map(LINE.match, text.splitlines()) if line]

    def _scores(self) -> dict[str, int]:
        """The files of the score store, and when they were written."""
        return {path: time for path, _, time in self.command.run.sub("store").state() if path.endswith(".parquet")}

    def _targets(self, kind: str) -> list[Any]:
        if kind == CUT:
            return [path for path, _, _ in self.command.run.state() if path.endswith((".parquet", ".json")) and _is_ours(path)]
        everybody = self.command.processes()
        return everybody[:1] if kind in (*STORAGE, STOPPED) else [one for one in everybody if _is(kind, one, everybody[0])]

    def _misbehave(self, kind: str, seconds: float) -> None:
        self.flag.write_text(kind)
        self.go_on(seconds)
        self.flag.unlink()
        self.met = True

    def _cut(self, run: Folder) -> None:
        for driver in self.command.processes()[:1]:
            self.killed += 1
            kill(driver.pid)
        self._watch(lambda: self.command.process is None)
        if files := sorted(self._targets(CUT)):
            path = self.draw.choice(files)
            name = path.removeprefix(f"{run.path}/")
            whole = run.read_bytes(name)
            run.write_bytes(name, whole[: self.draw.randrange(1 + len(whole))])
            self._tell(f"cut {name}")
            self.kept.pop(path, None)
            if not name.startswith("stages."):  # each of which stands in for the other
                self.known = set()

    def _tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:6.1f} s, run {self.done}: {text}")
        print(self.story[-1], flush=True)

    def _told(self) -> str:
        return "\n".join([*self.story, self.command.log.read_text()[-4000:]])


def _is_ours(path: str) -> bool:
    """Whether we write it, and not Ray."""
    return "/tune/" not in path and "/checkpoint_" not in path


def _everything(folder: Folder) -> fs.FileSelector:
    return fs.FileSelector(folder.path, recursive=True)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)


def _is(kind: str, process: psutil.Process, driver: psutil.Process) -> bool:
    try:
        return PROCESSES[kind](process, driver)
    except psutil.NoSuchProcess:
        return False
