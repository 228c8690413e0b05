"""requirements-cpu.lock: it has what pyproject.toml asks for, each with hashes, and names no place to fetch from."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements-cpu.lock").read_text()
ENTRY = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n(?:    #.*\n)*", re.MULTILINE)
EXTRAS = ("cpu", "demo", "dev")
"""Those of `make setup`."""

PINS = {canonicalize_name(entry["name"]): entry["version"] for entry in ENTRY.finditer(LOCK)}


def asked(requirements: list[str]) -> Iterator[Requirement]:
    """The requirements, those on an extra of the project itself replaced by what the extra asks for."""
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in sorted(requirement.extras):  # a set: pytest-xdist wants one order in all processes
                yield from asked(PROJECT["optional-dependencies"][extra])
        else:
            yield requirement


ASKED = list(asked([*PROJECT["dependencies"], f"{PROJECT['name']}[{','.join(EXTRAS)}]"]))


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_the_lock_satisfies_what_the_project_asks_for(requirement: Requirement) -> None:
    version = PINS.get(canonicalize_name(requirement.name))
    assert version, "not in the lock: make lock"
    assert requirement.specifier.contains(version, prereleases=True), f"the lock has {version}: make lock"


def test_every_line_of_the_lock_is_an_exact_version_with_hashes_or_a_comment() -> None:
    others = ENTRY.sub("", LOCK).splitlines()
    assert [line for line in others if line and not line.startswith("#")] == []
    assert len(PINS) == len(ENTRY.findall(LOCK)) > 200


def test_the_lock_names_no_place_to_fetch_from() -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|\bpypi\b|@ ", LOCK)


def test_the_makefile_installs_just_these_extras() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"EXTRAS ?= {','.join(EXTRAS)}\n" in makefile
    assert " ".join(f"--extra {extra}" for extra in EXTRAS) in makefile


def test_the_lock_leaves_out_what_keeps_transformers_from_being_imported() -> None:
    assert not PINS.keys() & {"torchvision", "torchaudio", "torchcodec"}
