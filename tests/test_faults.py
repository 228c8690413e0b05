"""Faults at random moments of a whole run: after each, the same command goes on, and ends with the tables of an undisturbed run.

A seeded handful by default. `make test-long` injects MASHUP_FAULTS of them; MASHUP_FAULT_SEED draws others.
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

FAULTS = int(os.environ.get("MASHUP_FAULTS", "3"))
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
ATTEMPTS = 4
"""After the fault is over."""

Tables = dict[str, Any]


@pytest.fixture(scope="module")
def config(
    tiny_base: str,
    make_adapter: Callable[..., Path],
    train_donor: Callable[..., None],
    write_jsonl: Any,
    word_rows: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    for seed in (1, 2):
        train_donor(folder / f"pool/related/{seed}", seed)
        make_adapter(folder / f"pool/random/{seed}", tiny_base, rank=2, alpha=4, seed=seed, std=0.1)
    return {
        "base": tiny_base,
        "pool": str(folder / "pool"),
        "target": {"train": write_jsonl(folder / "train.jsonl", word_rows)},
        "search": {"samples": 24, "engine": "transformers", "adapters_per_batch": 1, "cpus_per_actor": 1},
        "train": {"steps": 6, "batch_size": 8, "learning_rates": [5e-3], "evaluations": 3, "cpus_per_worker": 1},
    }


class Command:
    """`mashup run` of one run folder, in a process of its own with a Ray of its own."""

    def __init__(self, config: dict[str, Any], folder: Path):
        self.run, self.flag, self.log = folder / "run", folder / "fault", folder / "log"
        self.file = folder / "config.yaml"
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


def _draws() -> Iterator[tuple[int, str]]:
    """Seeds and kinds: every kind comes in turn, in an order of the seed's."""
    draw = random.Random(SEED)
    kinds: list[str] = []
    for number in range(FAULTS):
        kinds = kinds or draw.sample(KINDS, len(KINDS))
        yield SEED * 1000 + number, kinds.pop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "kind"), _draws())
def test_after_a_fault_the_same_command_ends_with_the_same_tables(
    seed: int, kind: str, config: dict[str, Any], undisturbed: tuple[Tables, float], tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    command, draw = Command(config, tmp_path), random.Random(seed)
    moment = draw.uniform(0.1, 1) * seconds
    process = command.start()
    if _ended(process, moment) is None:
        _inject(kind, command, process, draw)
    for _ in range(ATTEMPTS):
        code = _ended(process, 300)
        assert code in (0, 1, -signal.SIGKILL), (
            f"{kind} after {moment:.1f} s: exit code {code}\n{command.log.read_text()[-3000:]}"
        )
        if code == 0:
            break
        process = command.start()
    assert code == 0, f"{kind} after {moment:.1f} s: {ATTEMPTS} attempts\n{command.log.read_text()[-3000:]}"
    assert command.tables() == expected, f"{kind} after {moment:.1f} s"
    assert not list(command.run.rglob("*.partial"))


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
