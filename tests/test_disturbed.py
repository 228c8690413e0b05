"""Faults at random moments of whole runs: after them the same command goes on, and ends with the tables of an undisturbed run.

A seeded handful by default. `make test-long` injects MASHUP_FAULTS of them, AT_ONCE in each test; MASHUP_FAULT_SEED draws others.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Cluster, Command, Tables
from nodes import kill

FAULTS = int(os.environ.get("MASHUP_FAULTS", "3"))
SEED = int(os.environ.get("MASHUP_FAULT_SEED", "0"))
AT_ONCE = 10
ALONE = 4
"""Every so many tests the commands have a Ray of their own, in the others they join a cluster that stays."""

PROCESSES = {
    "driver": lambda process, driver: process == driver,
    "scoring actor": lambda process, driver: "ScoringActor" in process.name() + " ".join(process.cmdline()),
    "scoreboard": lambda process, driver: "Scoreboard" in process.name() + " ".join(process.cmdline()),
    "training worker": lambda process, driver: "RayTrainWorker" in " ".join(process.cmdline()),
    "any worker": lambda process, driver: " ".join(process.cmdline()).startswith("ray::"),
    "node": lambda process, driver: process.name() == "raylet",
}
"""What is killed, among the driver and those that work for it."""

STORAGE = ("full", "slow", "wrong", "gone", "clock on", "clock back")
"""What the storage, or the clock, does for a while: see tests/faulty/sitecustomize.py."""

CUT = "half a file"
"""The driver is killed, and a file that it left is cut short."""

KINDS = (*PROCESSES, *STORAGE, CUT)
PAUSE, HOLD = 0.25, 0.05
"""Longest pause before a fault, and longest life of what is then to be killed, as shares of what an undisturbed run takes."""
WHILE = 5.0
"""Longest seconds of a fault of the storage."""
STUCK = 600.0
"""Seconds in which a fault finds no target, or a command does not end."""


@pytest.fixture(scope="module")
def config(
    write_pool: Callable[[Path], Path],
    small_config: Callable[[Path, Path], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    short = {"merge": {"k": 2, "weights": "equal"}, "compare": {"inits": ["mashup"]}}
    return small_config(write_pool(folder / "pool"), folder) | short


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("cluster") / "fault")
    yield one
    one.end()


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, float]:
    """The tables of a run to which nothing happens, and how many seconds it takes."""
    command = Command(config, tmp_path_factory.mktemp("undisturbed"), cluster.flag, cluster)
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


@pytest.mark.timeout(900 + 150 * min(FAULTS, AT_ONCE))
@pytest.mark.parametrize(("seed", "kinds"), _draws(), ids=lambda value: "-".join(value) if isinstance(value, list) else None)
def test_after_faults_the_same_command_ends_with_the_same_tables(
    seed: int, kinds: list[str], cluster: Cluster, config: dict[str, Any], undisturbed: tuple[Tables, float], tmp_path: Path
) -> None:
    alone = seed % ALONE == ALONE - 1
    draw, (expected, seconds) = random.Random(seed), undisturbed
    runs = Runs(draw, config, tmp_path, expected, None if alone else cluster)
    try:
        for kind in kinds:
            runs.go_on(draw.uniform(0, PAUSE * seconds))
            runs.suffer(kind, draw.uniform(0, HOLD * seconds))
        runs.finish()
    finally:
        runs.end()


class Runs:
    """One command after the other: in the same run folder until the run is done, and then in a new one.

    A command that met a fault goes on, or ends and says that it can go on; one that met none must not fail.
    """

    def __init__(self, draw: random.Random, config: dict[str, Any], folder: Path, expected: Tables, cluster: Cluster | None):
        self.draw, self.config, self.folder, self.expected, self.cluster = draw, config, folder, expected, cluster
        self.flag = cluster.flag if cluster else folder / "fault"
        self.story, self.began, self.done = list[str](), time.monotonic(), 0
        self._begin()

    def go_on(self, seconds: float) -> None:
        """Let nothing happen for a while."""
        end = time.monotonic() + seconds
        self._watch(lambda: time.monotonic() > end)

    def suffer(self, kind: str, later: float) -> None:
        """Let a fault come, some seconds after there is something that it can strike."""
        self._watch(lambda: bool(self._targets(kind)))
        self.go_on(later)
        self._watch(lambda: bool(self._targets(kind)))
        self._tell(kind)
        self.kept |= {file: file.stat().st_mtime_ns for file in self.command.run.glob("store/*/*.parquet")}
        self.met = True
        if kind in STORAGE:
            self._misbehave(kind, self.draw.uniform(1, WHILE))
        elif kind == CUT:
            self._cut(self.command.run)
        elif targets := self._targets(kind):
            self.killed += 1
            kill(self.draw.choice(targets).pid)

    def finish(self) -> None:
        """Without a further fault, the run that is on comes to its end."""
        done = self.done
        if self.command.run.exists():
            self._watch(lambda: self.done > done)

    def end(self) -> None:
        """Leave nothing that runs."""
        self.flag.unlink(missing_ok=True)
        for process in self.command.processes()[:1]:
            kill(process.pid)
            self.command.ended(60)

    def _begin(self) -> None:
        self.command = Command(self.config, self.folder / str(self.done), self.flag, self.cluster)
        self.met, self.killed, self.kept = False, 0, dict[Path, int]()

    def _watch(self, until: Callable[[], bool]) -> None:
        """Keep the command running until something is so."""
        deadline = time.monotonic() + STUCK
        while not until():
            assert time.monotonic() < deadline, self._told()
            if self.command.process is None:
                self.command.start()
            if (code := self.command.ended(0.2)) is not None:
                self._over(code)

    def _over(self, code: int) -> None:
        self._tell(f"ended with {code}")
        assert code in (0, 1, -signal.SIGKILL), self._told()
        if code:
            assert self.met, self._told()
            self.met = self.flag.exists()
            return
        assert self.command.tables() == self.expected, self._told()
        # Who is killed while it writes leaves the file; an hour later it is swept up.
        assert len(list(self.command.run.rglob("*.partial"))) <= self.killed, self._told()
        assert {file: file.stat().st_mtime_ns for file in self.kept} == self.kept, self._told()
        self.done += 1
        self._begin()

    def _targets(self, kind: str) -> list[Any]:
        if kind == CUT:
            return [file for file in self.command.run.rglob("*") if file.suffix in (".parquet", ".json") and _is_ours(file)]
        everybody = self.command.processes()
        return everybody[:1] if kind in STORAGE else [one for one in everybody if _is(kind, one, everybody[0])]

    def _misbehave(self, kind: str, seconds: float) -> None:
        self.flag.write_text(kind)
        self.go_on(seconds)
        self.flag.unlink()
        self.met = True

    def _cut(self, run: Path) -> None:
        for driver in self.command.processes()[:1]:
            self.killed += 1
            kill(driver.pid)
        self._watch(lambda: self.command.process is None)
        if files := sorted(self._targets(CUT)):
            file = self.draw.choice(files)
            file.write_bytes(file.read_bytes()[: self.draw.randrange(1 + file.stat().st_size)])
            self._tell(f"cut {file.relative_to(run)} at {file.stat().st_size}")
            self.kept.pop(file, None)

    def _tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:6.1f} s, run {self.done}: {text}")
        print(self.story[-1], flush=True)

    def _told(self) -> str:
        return "\n".join([*self.story, self.command.log.read_text()[-4000:]])


def _is_ours(file: Path) -> bool:
    """Whether we write it, and not Ray."""
    return "tune" not in file.parts and not any(part.startswith("checkpoint_") for part in file.parts)


def _is(kind: str, process: psutil.Process, driver: psutil.Process) -> bool:
    try:
        return PROCESSES[kind](process, driver)
    except psutil.NoSuchProcess:
        return False
