"""A metric of one's own, as a module on Python's path."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MODULE = """
calls = []

def share(prompts, answers, references):
    calls.append(len(answers))
    return [{body}]

def one(prompts, answers, references):
    return 1.0

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """module(body): a module with a function `share` that gives such a list; its name, as long as the test lasts."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> str:
        (tmp_path / "own_metric.py").write_text(MODULE.format(body=body))
        sys.modules.pop("own_metric", None)
        return "own_metric"

    yield write
    sys.modules.pop("own_metric", None)
