"""The pages of docs/ and the README: links lead somewhere, examples are of this version, and the README is short."""

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/results/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_configuration_page_is_that_of_the_schema() -> None:
    made = runpy.run_path(str(ROOT / "docs/configuration.py"))["page"]()
    assert made == (ROOT / "docs/configuration.md").read_text(), "run `python docs/configuration.py`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:pipeline|jobs|tests|benchmarks|examples|docs)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_are_to_be_run_are_there(page: Path) -> None:
    for module in re.findall(r"python -m ((?:jobs|benchmarks|examples)[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(module), module


def test_examples_in_python_import_what_there_is() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
        assert [name for name in names if not importlib.util.find_spec(f"{node.module}.{name}")] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1300
