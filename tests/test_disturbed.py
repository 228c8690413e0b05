"""Faults at random moments of a whole run: after them the same command goes on, and ends with the tables of an undisturbed run.

A seeded handful by default. `make test-long` injects MASHUP_FAULTS of them, A_RUN in each run; MASHUP_FAULT_SEED draws others.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

FAULTS = int(os.environ.get("MASHUP_FAULTS", "2"))
A_RUN = 4
SEED = int(os.environ.get("MASHUP_FAULT_SEED", "0"))

PROCESSES = {
    "driver": lambda process, driver: process == driver,
    "scoring actor": lambda process, driver: "ScoringActor" in process.name() + " ".join(process.cmdline()),
    "training worker": lambda process, driver: "RayTrainWorker" in " ".join(process.cmdline()),
    "any worker": lambda process, driver: " ".join(process.cmdline()).startswith("ray::"),
    "node": lambda process, driver: process.name() == "raylet",
}
"""What is killed, among the driver and its descendants."""

STORAGE = ("full", "slow", "wrong", "gone", "clock on", "clock back")
"""What the storage, or the clock, does for a while: see tests/faulty/sitecustomize.py."""

KINDS = (*PROCESSES, *STORAGE, "half a file")
ATTEMPTS = 2
"""After the last fault."""

Tables = dict[str, Any]


@pytest.fixture(scope="module")
def config(
    write_pool: Callable[[Path], Path],
    small_config: Callable[[Path, Path], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    short = {"merge": {"k": 2, "weights": "equal"}, "compare": {"inits": ["mashup"]}}
    return small_config(write_pool(folder / "pool"), folder) | short


class Command:
    """`mashup run` of one run folder, in a process of its own with a Ray of its own."""

    def __init__(self, config: dict[str, Any], folder: Path):
        self.run, self.flag, self.log = folder / "run", folder / "fault", folder / "log"
        self.file = folder / "config.yaml"
        folder.mkdir(exist_ok=True)
        self.file.write_text(yaml.safe_dump({**config, "run": str(self.run)}))

    def start(self) -> psutil.Popen:
        path = os.pathsep.join([str(Path(__file__).parent / "faulty"), *sys.path])
        environment = os.environ | {"MASHUP_FAULT": str(self.flag), "PYTHONPATH": path}
        command = [sys.executable, "-m", "pipeline.cli", "run", str(self.file)]
        return psutil.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.log.open("a"), start_new_session=True, env=environment
        )

    def tables(self) -> Tables:
        """What a run comes to, without times and places."""
        curves = [row | {"seconds": None} for row in pq.read_table(self.run / "comparison.parquet").to_pylist()]
        selection = json.loads((self.run / "selection.json").read_text())
        names = ("catalogue.parquet", "leaderboard.parquet", "samples.parquet")
        tables = {name: pq.read_table(self.run / name).to_pylist() for name in names}
        return tables | {"comparison.parquet": json.dumps(curves), "selection.json": selection}


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, float]:
    """The tables, and how many seconds they took."""
    command, started = Command(config, tmp_path_factory.mktemp("undisturbed")), time.monotonic()
    assert _ended(command.start(), 300) == 0, command.log.read_text()[-3000:]
    return command.tables(), time.monotonic() - started


def _draws() -> Iterator[tuple[int, list[str]]]:
    """For each run a seed and the kinds of its faults: every kind comes in turn, in an order of the seed's."""
    draw = random.Random(SEED)
    kinds: list[str] = []
    for number, start in enumerate(range(0, FAULTS, A_RUN)):
        while len(kinds) < A_RUN:
            kinds += draw.sample(KINDS, len(KINDS))
        yield SEED * 1000 + number, [kinds.pop(0) for _ in range(min(A_RUN, FAULTS - start))]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "kinds"), _draws(), ids=lambda value: "-".join(value) if isinstance(value, list) else None)
def test_after_faults_the_same_command_ends_with_the_same_tables(
    seed: int, kinds: list[str], config: dict[str, Any], undisturbed: tuple[Tables, float], tmp_path: Path
) -> None:
    """After a fault the command either goes on, until it is killed for the next one or at its end, or says that it can go on."""
    expected, seconds = undisturbed
    draw, story = random.Random(seed), list[str]()
    command = Command(config, tmp_path / "0")
    for number, kind in enumerate(kinds, start=1):
        process, moment = command.start(), draw.uniform(0.1, 0.8) * seconds
        if _ended(process, moment) is None:
            _inject(kind, command, process, draw)
        code = _ended(process, draw.choice((draw.uniform(0, 10), 300)))
        story.append(f"{kind} after {moment:.1f} s: {'goes on' if code is None else code}")
        if code is None:
            _kill(process)
            code = _ended(process, 60)
        _check(code, command, expected, story)
        if code == 0 and number < len(kinds):
            command = Command(config, tmp_path / str(number))
    for _ in range(ATTEMPTS):
        code = _ended(command.start(), 300)
        story.append(f"again: {code}")
        if code == 0:
            break
    assert code == 0, f"{story}\n{command.log.read_text()[-3000:]}"
    _check(code, command, expected, story)


def _check(code: int | None, command: Command, expected: Tables, story: list[str]) -> None:
    assert code in (0, 1, -signal.SIGKILL), f"{story}\n{command.log.read_text()[-3000:]}"
    if code == 0:
        assert command.tables() == expected, story
        assert not list(command.run.rglob("*.partial")), story


def _inject(kind: str, command: Command, driver: psutil.Popen, draw: random.Random) -> None:
    if kind in STORAGE:
        command.flag.write_text(kind)
        _ended(driver, draw.uniform(1, 10))
        command.flag.unlink()
    elif kind == "half a file":
        _kill(driver)
        _ended(driver, 60)
        if files := sorted(path for path in command.run.rglob("*") if path.suffix in (".parquet", ".json") and _is_ours(path)):
            file = draw.choice(files)
            file.write_bytes(file.read_bytes()[: draw.randrange(1 + file.stat().st_size)])
    else:
        everybody = [psutil.Process(driver.pid), *_descendants(driver)]
        if chosen := [process for process in everybody if _is(kind, process, driver)]:
            _kill(draw.choice(chosen))


def _is_ours(file: Path) -> bool:
    """Whether we write it, and not Ray."""
    return "tune" not in file.parts and not any(part.startswith("checkpoint_") for part in file.parts)


def _is(kind: str, process: psutil.Process, driver: psutil.Popen) -> bool:
    try:
        return PROCESSES[kind](process, psutil.Process(driver.pid))
    except psutil.NoSuchProcess:
        return False


def _kill(process: Any) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ended(process: psutil.Popen, seconds: float) -> int | None:
    """The exit code once the command and its Ray are gone; None where it still runs after so many seconds."""
    deadline, family = time.monotonic() + seconds, set[psutil.Process]()
    while (code := process.poll()) is None:
        family |= set(_descendants(process))
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    _, alive = psutil.wait_procs([one for one in family if one.is_running()], timeout=60)
    for one in alive:
        _kill(one)
    return int(code)
