"""What the study keeps: a table with one row for each arm of a task, base and seed, written as the arms are done.

It is a CSV file of a few hundred bytes a row, to be committed. With it `python -m benchmarks.study` goes on on another machine,
and `python -m benchmarks.study_tables` makes all tables and figures. Rows are only added; of several of one arm the last counts.
A list, such as a curve, is one cell with blanks between its values.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

FILE = "arms.csv"

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class StudyArm:
    """An arm of the study, or a start that a task does not have, such as the mashup where the verdict is 'base': without a rate.

    Curves have a value for each evaluation on the validation split, the first before any step. Figures of the test split are of
    the arms alone whose rate was chosen.
    """

    base: str
    task: str
    init: str
    seed: int
    settings: str
    """Digest of what every task is asked alike, and of `study.RESULTS`."""
    inputs: str
    """Digest of the base, the pool and the task's data."""
    kin: bool
    """Whether an adapter of a related task was in the pool."""
    verdict: str
    recipe: str
    donors: str
    overhead_seconds: float
    """Index, samples, search over all candidates and merge, engine start included."""
    charged_seconds: float | None
    """What the paper's accounting charges in its place: one evaluation of one donor, and the merge. None: nothing was scored."""
    test_rows: int
    machine: str
    start_seconds: float | None = None
    """To make a start that needs no donors."""
    lr: float | None = None
    steps: Numbers = ()
    seconds: Numbers = ()
    """In training steps up to each evaluation."""
    validation_nll: Numbers = ()
    validation_token_accuracy: Numbers = ()
    validation_exact_match: Numbers = ()
    test_nll: float | None = None
    test_token_accuracy: float | None = None
    test_exact_match: float | None = None
    test_answer_match: float | None = None
    """Exact match without the end of the turn."""

    @property
    def key(self) -> tuple[str, str, str, float | None, int]:
        return self.base, self.task, self.init, self.lr, self.seed

    @property
    def is_chosen(self) -> bool:
        return self.test_nll is not None


COLUMNS = [field.name for field in fields(StudyArm)]
TYPES = get_type_hints(StudyArm)


def read_arms(file: Path) -> list[StudyArm]:
    """The arms of a table, none where there is no table. Lines that were cut short are passed over.

    Raises:
        ValueError: a column is missing.
    """
    if not file.exists():
        return []
    lines = csv.DictReader(io.StringIO(file.read_text()), restval=None)
    if missing := [name for name in COLUMNS if name not in (lines.fieldnames or [])]:
        raise ValueError(f"{file}: column {missing[0]!r} is missing")
    whole = (line for line in lines if None not in line.values() and None not in line)
    arms = (StudyArm(**{name: _read(TYPES[name], line[name]) for name in COLUMNS}) for line in whole)
    return list({arm.key: arm for arm in arms}.values())


def add_arms(file: Path, arms: Iterable[StudyArm]) -> None:
    """Append arms to a table, which is begun where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text() if file.exists() else ""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows({name: _written(value) for name, value in asdict(arm).items()} for arm in arms)
    with file.open("a") as table:
        table.write(("" if before.endswith("\n") or not before else "\n") + text.getvalue())


def lacking(
    arms: Sequence[StudyArm], wanted: Mapping[str, str], inits: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, ...], list[int]]:
    """What is not in the table yet: starts -> the seeds that lack them.

    Args:
        wanted: base, task, settings and inputs that an arm must have.
    """
    agree = [arm for arm in arms if all(getattr(arm, name) == value for name, value in wanted.items())]
    done = {(arm.init, arm.seed) for arm in agree}
    found: dict[tuple[str, ...], list[int]] = {}
    for seed in seeds:
        if missing := tuple(init for init in inits if (init, seed) not in done):
            found.setdefault(missing, []).append(seed)
    return found


def _written(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(_written, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _read(kind: Any, text: str) -> Any:
    if kind == Numbers:
        return tuple(map(float, text.split()))
    if kind is bool:
        return text == "True"
    if kind in (str, int, float):
        return kind(text)
    return float(text) if text else None
