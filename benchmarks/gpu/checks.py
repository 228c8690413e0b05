"""What a check is, and how the checks of a stage are run one after the other.

A check is a function of a `Setting` that gives its figures. It fails by raising, whatever it raises, and the next one goes on.
Results are in a JSON file, written anew when a check begins and when it ends: a run that is killed leaves all that it had.
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, RUNNING = "ok", "FAILED", "skipped", "running"


@dataclass(frozen=True)
class Setting:
    """Where checks run: `device` is cuda, with models of real shapes, or cpu, with tiny ones."""

    device: str
    scratch: Path

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


Check = Callable[[Setting], dict[str, Any]]


class SkippedError(Exception):
    """Why a check has nothing to look at here."""


class WrongError(Exception):
    """What a check found is not as it must be, with the figures that say so."""

    def __init__(self, why: str, figures: dict[str, Any] | None = None):
        super().__init__(why)
        self.figures = figures or {}


def within(figures: dict[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """The figures, none of which is above its limit.

    Raises:
        WrongError: one is, or is no number.
    """
    wrong = [f"{name} {figures[name]:.3g} is above {limit:.3g}" for name, limit in limits.items() if not figures[name] <= limit]
    if wrong:
        raise WrongError(", ".join(wrong), figures)
    return figures


def one_line(figures: Mapping[str, Any]) -> str:
    """Figures for a person: 'tokens_s 1234, peak_gb 1.5'."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())


@dataclass(frozen=True)
class Record:
    """How a check ended."""

    stage: str
    check: str
    status: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    why: str | None = None

    def __str__(self) -> str:
        told = f"{self.status}: {self.why}" if self.why else self.status
        return ", ".join(filter(None, (f"{self.stage} {self.check}: {told}", one_line(self.figures), f"{self.seconds:.1f} s")))


class Results:
    """The records of all stages, in a file that each stage's process reads first."""

    def __init__(self, path: Path):
        self.path = path
        self.about: dict[str, Any] = {}
        self.records: list[Record] = []
        self.load()

    def load(self) -> None:
        """Read what another process has found."""
        with suppress(FileNotFoundError):
            content = json.loads(self.path.read_text())
            self.about, self.records = content["about"], [Record(**record) for record in content["checks"]]

    def tell(self, **about: Any) -> None:
        """Keep something about the machine."""
        self.about |= about
        self._write()

    def begin(self, stage: str, check: str) -> None:
        self.records.append(Record(stage, check, RUNNING))
        self._write()

    def end(self, record: Record) -> None:
        """Keep how a check ended, and say it."""
        self.records = [one for one in self.records if (one.stage, one.check) != (record.stage, record.check)] + [record]
        self._write()
        print(record, flush=True)

    def stopped(self, why: str) -> None:
        """What was running when its process ended has failed."""
        for record in [record for record in self.records if record.status == RUNNING]:
            self.end(Record(record.stage, record.check, FAILED, why=why))

    def count(self, status: str) -> int:
        return sum(record.status == status for record in self.records)

    def has(self, stage: str, check: str) -> bool:
        return any((record.stage, record.check) == (stage, check) for record in self.records)

    def as_dict(self) -> dict[str, Any]:
        return {"about": self.about, "checks": [asdict(record) for record in self.records]}

    def _write(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.as_dict(), indent=1))
        os.replace(partial, self.path)


def run_checks(
    stage: str, checks: Sequence[Check], setting: Setting, results: Results, end: float, usable: Callable[[], bool]
) -> bool:
    """Run the checks of a stage that have no record yet; those that would begin after `end` (as `time.time()`) are skipped.

    Args:
        usable: frees what a check has left, and whether the device still works: an illegal access breaks it for the process.

    Returns:
        Whether all have a record; if not, a fresh process is needed for the others.
    """
    for check in checks:
        if results.has(stage, check.__name__):
            continue
        if time.time() >= end:
            results.end(Record(stage, check.__name__, SKIPPED, why="the stage's time is over"))
            continue
        results.begin(stage, check.__name__)
        results.end(_run(stage, check, setting))
        if not usable():
            return False
    return True


def _run(stage: str, check: Check, setting: Setting) -> Record:
    started = time.perf_counter()
    status, why, figures = OK, None, dict[str, Any]()
    try:
        figures = check(setting)
    except SkippedError as reason:
        status, why = SKIPPED, str(reason)
    except WrongError as error:
        status, figures, why = FAILED, error.figures, str(error)
    except Exception as error:  # of whatever kind: the next check goes on
        traceback.print_exc(file=sys.stderr)
        status, why = FAILED, f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0]}"
    return Record(stage, check.__name__, status, round(time.perf_counter() - started, 2), _for_json(figures), why)


def _for_json(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()
    }
