"""requirements-cpu.lock and requirements-gpu.lock: they have what pyproject.toml asks for, each with hashes, and name no place to
fetch from."""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n(?:    #.*\n)*", re.MULTILINE)
EXTRAS = ("cpu", "demo", "dev")
"""Those of `make setup`."""

DEVICES = ("cpu", "gpu")
LOCKS = {device: (ROOT / f"requirements-{device}.lock").read_text() for device in DEVICES}
PINS = {
    device: {canonicalize_name(entry["name"]): entry["version"] for entry in ENTRY.finditer(lock)}
    for device, lock in LOCKS.items()
}


def asked(requirements: list[str]) -> Iterator[Requirement]:
    """The requirements, those on an extra of the project itself replaced by what the extra asks for."""
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in sorted(requirement.extras):  # a set: pytest-xdist wants one order in all processes
                yield from asked(PROJECT["optional-dependencies"][extra])
        else:
            yield requirement


def asked_on(device: str) -> list[Requirement]:
    return list(asked([*PROJECT["dependencies"], f"{PROJECT['name']}[{device},{','.join(EXTRAS[1:])}]"]))


@pytest.mark.parametrize(("device", "requirement"), [(device, one) for device in DEVICES for one in asked_on(device)], ids=str)
def test_the_lock_satisfies_what_the_project_asks_for(device: str, requirement: Requirement) -> None:
    version = PINS[device].get(canonicalize_name(requirement.name))
    assert version, "not in the lock: make lock"
    assert requirement.specifier.contains(version, prereleases=True), f"the lock has {version}: make lock"


@pytest.mark.parametrize("device", DEVICES)
def test_every_line_of_the_lock_is_an_exact_version_with_hashes_or_a_comment(device: str) -> None:
    others = ENTRY.sub("", LOCKS[device]).splitlines()
    assert [line for line in others if line and not line.startswith("#")] == []
    assert len(PINS[device]) == len(ENTRY.findall(LOCKS[device])) > 200


@pytest.mark.parametrize("device", DEVICES)
def test_the_lock_names_no_place_to_fetch_from(device: str) -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|\bpypi\b|@ ", LOCKS[device])


def test_the_makefile_installs_just_these_extras() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"EXTRAS ?= {','.join(EXTRAS)}\n" in makefile
    for device in DEVICES:
        extras = [device, *EXTRAS[1:]]
        assert " ".join(f"--extra {extra}" for extra in extras) in makefile
        assert f"--requirement requirements-{device}.lock" in make("setup", "LOCKED=1", f"EXTRAS={','.join(extras)}")


def test_the_makefile_has_no_lock_for_other_extras() -> None:
    assert "no lock has another set" in make("setup", "LOCKED=1", "EXTRAS=gpu")
    assert "requirements" not in make("setup", "EXTRAS=gpu")


def make(*arguments: str) -> str:
    """What make would do, or what it says against it."""
    command = ["make", "--dry-run", "VENV=venv-that-is-not", *arguments]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not those of a make around this
    done = subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_lock_leaves_out_what_keeps_transformers_from_being_imported() -> None:
    assert not PINS["cpu"].keys() & {"torchvision", "torchaudio", "torchcodec"}


def test_on_gpus_all_that_is_built_for_cuda_is_built_for_the_same() -> None:
    """CUDA 13, whose driver cluster.yaml and the manifests ask for."""
    pins = PINS["gpu"]
    assert {version.split(".")[0] for name, version in pins.items() if name in ("cuda-python", "cuda-bindings")} == {"13"}
    assert pins["nvidia-cuda-runtime"].startswith("13.")
