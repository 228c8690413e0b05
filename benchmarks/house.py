"""What can be counted of the code's order: `python -m benchmarks.house` prints it as JSON.

modules       .py files directly in pipeline/, the goal is at most 7
folders       packages in pipeline/, and the modules in each
imports       whether all go down (import-linter, the contract in pyproject.toml)
functions     their number, median and largest number of lines; goals: a median of at most 8, none over 40
unannotated   functions of which an argument or the result has no type; the goal is none
untested      modules without a test file of their name
readme_words  the goal is at most 1,300
lines         of pipeline/
"""

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    files = sorted((ROOT / "pipeline").rglob("*.py"))
    functions = [(file, one) for file in files for one in _functions(file)]
    lengths = [_lines(one) for _, one in functions]
    linted = subprocess.run([str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, check=False)
    counts: dict[str, Any] = {
        "modules": len([file for file in files if file.parent.name == "pipeline" and file.name != "__init__.py"]),
        "folders": dict(
            Counter(file.parent.name for file in files if file.parent.name != "pipeline" and file.stem != "__init__")
        ),
        "imports": "down" if linted.returncode == 0 else linted.stdout.decode()[-2000:],
        "functions": {"number": len(lengths), "median": median(lengths), "largest": max(lengths)},
        "unannotated": [f"{file.relative_to(ROOT)}: {one.name}" for file, one in functions if not _annotated(one)],
        "untested": [str(file.relative_to(ROOT)) for file in files if not _tested(file)],
        "readme_words": len((ROOT / "README.md").read_text().split()),
        "lines": sum(len(file.read_text().splitlines()) for file in files),
    }
    print(json.dumps(counts, indent=2))


def _functions(file: Path) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function))


def _lines(function: Function) -> int:
    """Without the docstring, which explains and does not have to be followed."""
    first = function.body[0]
    said = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) and first.end_lineno else 0
    return int(function.end_lineno or 0) - function.lineno + 1 - said


def _annotated(function: Function) -> bool:
    given = [
        *function.args.posonlyargs,
        *function.args.args,
        *function.args.kwonlyargs,
        function.args.vararg,
        function.args.kwarg,
    ]
    typed = all(one.annotation or one.arg in ("self", "cls") for one in given if one)
    return typed and function.returns is not None


def _tested(file: Path) -> bool:
    place = ROOT / "tests" / file.parent.relative_to(ROOT / "pipeline") / f"test_{file.name}"
    return file.name == "__init__.py" or place.exists()


if __name__ == "__main__":
    main()
