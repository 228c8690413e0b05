"""Pools on the Hub: the adapters of a base and those of a repository, each pinned to its commit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, serve_hub

from pipeline.adapters.hub_pool import adapters_on_hub
from pipeline.core.errors import InputError
from pipeline.core.file_names import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

Ask = Callable[..., list[Any]]

LOOK = """
import json, sys
from pipeline.adapters.pool import look_at
from pipeline.core.errors import InputError

for pool in sys.argv[1:]:
    try:
        print(json.dumps(look_at(pool).found))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def look_from(tmp_path: Path) -> Ask:
    """look_from(endpoint, *pools): what `look_at` finds or says."""

    def ask(endpoint: str, *pools: str) -> list[Any]:  # huggingface_hub reads its settings once in a process
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", LOOK, *pools]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return ask


def adapter_of(base: str) -> dict[str, bytes]:
    return {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights", CARD_FILE: f"---\nbase_model: {base}\n---\n".encode()}


def test_the_adapters_of_a_base_are_a_pool_and_the_most_downloaded_come_first(look_from: Ask) -> None:
    repos = {"org/a": adapter_of("org/base"), "org/b": adapter_of("org/base"), "org/c": adapter_of("other/base")}
    repos["org/d"] = adapter_of("org/base-4bit")
    downloads = {"org/a": 1, "org/b": 5, "org/d": 3}
    pools = ["hf://?base=org/base", "hf://?base=org/base&base=org/base-4bit&limit=2", "hf://?base=org/nobody"]
    with serve_hub(repos, downloads=downloads) as (endpoint, asked):
        all_of_them, two, none = look_from(endpoint, *pools)
    assert all_of_them == [
        ["org/b", f"hf://org/b@{COMMIT}", None, COMMIT, 5],
        ["org/a", f"hf://org/a@{COMMIT}", None, COMMIT, 1],
    ]
    assert [name for name, *_ in two] == ["org/b", "org/d"]
    assert "no adapter found" in none
    assert not asked  # nothing is fetched before it is its turn


def test_the_folders_of_a_repository_are_a_pool(look_from: Ask) -> None:
    names = (
        CONFIG_FILE,
        f"x/{CONFIG_FILE}",
        f"x/{WEIGHTS_FILE}",
        f"x/checkpoint-5/{WEIGHTS_FILE}",
        f"xy/{CONFIG_FILE}",
        "readme",
    )
    pools = ["hf://org/many", "hf://org/many@main/x", "hf://org/none"]
    with serve_hub({"org/many": dict.fromkeys(names, b"")}) as (endpoint, _):
        whole, below, absent = look_from(endpoint, *pools)
    assert [name for name, *_ in whole] == ["org/many", "org/many/x", "org/many/x/checkpoint-5", "org/many/xy"]
    assert [uri for _, uri, *_ in below] == [f"hf://org/many@{COMMIT}/x", f"hf://org/many@{COMMIT}/x/checkpoint-5"]
    assert "the Hub says no (404" in absent


def test_an_entry_of_a_list_is_pinned_to_the_commit_of_its_revision(look_from: Ask, tmp_path: Path) -> None:
    files = {CONFIG_FILE: b"{}", f"x/{CONFIG_FILE}": b"{}"}
    commit = "1" * 40
    lines = ["org/a", "org/a@v1", "org/a@refs%2Fpr%2F1/x", "hf://org/a/x", f"org/b@{commit}", "org/none"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with serve_hub({"org/a": files}) as (endpoint, _):
        [found] = look_from(endpoint, str(tmp_path / "list.txt"))
    assert {name: (uri, state) for name, uri, _, state, _ in found} == {
        "org/a": (f"hf://org/a@{COMMIT}", COMMIT),
        "org/a@v1": (f"hf://org/a@{COMMIT}", COMMIT),
        "org/a@refs%2Fpr%2F1/x": (f"hf://org/a@{COMMIT}/x", COMMIT),
        "org/a/x": (f"hf://org/a@{COMMIT}/x", COMMIT),
        f"org/b@{commit}": (f"hf://org/b@{commit}", commit),  # nothing is to be asked
        "org/none": ("hf://org/none", None),
    }


@pytest.mark.parametrize(
    "pool",
    [
        *("hf://", "hf://?", "hf://?base=", "hf://?base=name", "hf://?limit=5", "hf://?base=a/b&limit=0", "hf://?base=a/b&top=3"),
        *("hf://org", "hf://?base=a/b&limit=x", "hf://org/name?base=a/b"),
    ],
)
def test_a_pool_that_is_written_otherwise_is_an_input_error(pool: str) -> None:
    with pytest.raises(InputError, match="a pool on the Hub is hf://"):
        adapters_on_hub(pool)
