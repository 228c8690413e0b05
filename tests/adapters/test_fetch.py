"""Bringing an adapter here: from a folder, the Hub's cache or an object store; what cannot be reached says so."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import COMMIT, serve_hub

from pipeline.adapters.fetch import fetch_adapter
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import FILES, WEIGHTS_FILE
from pipeline.core.storage import Folder


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        assert fetch_adapter(uri, tmp_path / "cache") == tmp_path / "a"
    assert not (tmp_path / "cache").exists()


def test_an_adapter_in_an_object_store_is_copied_without_its_other_files(bucket: str, tmp_path: Path) -> None:
    store = Folder.at(f"{bucket}/pool")
    for name in (*FILES, "optimizer.pt"):
        store.write_text(f"a/{name}", f"content of {name}")
        store.write_text(f"b/{name}", "another")
    found = fetch_adapter(f"{bucket}/pool/a", tmp_path)
    assert sorted(path.name for path in found.iterdir()) == sorted(FILES)
    assert (found / WEIGHTS_FILE).read_text() == f"content of {WEIGHTS_FILE}"
    assert fetch_adapter(f"{bucket}/pool/b", tmp_path) != found


def test_an_adapter_that_is_not_in_the_store_gives_an_empty_folder(bucket: str, tmp_path: Path) -> None:
    assert list(fetch_adapter(f"{bucket}/pool/none", tmp_path).iterdir()) == []


def test_a_store_that_cannot_be_reached_is_an_adapter_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be fetched from nope://x/y"):
        fetch_adapter("nope://x/y", tmp_path)


@pytest.mark.parametrize("repo", ["no-org/no-adapter", "not a valid id!", "a/b/c", "not valid/either!"])
def test_a_hub_id_that_is_not_in_the_cache_is_an_adapter_error(repo: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be fetched from the Hub"):
        fetch_adapter(f"hf://{repo}", tmp_path)


FETCH = """
import sys
from pipeline.core.errors import AdapterError
from pipeline.adapters.fetch import locate

for repo in sys.argv[1:]:
    try:
        print(locate(f"hf://{repo}", 1000))
    except AdapterError as error:
        print(error)
"""


@pytest.fixture
def locate_from(tmp_path: Path) -> Callable[..., list[str]]:
    """locate_from(endpoint, *repos): what `locate` gives or says of a Hub's repositories, of at most 1,000 bytes each."""

    def ask(endpoint: str, *repos: str) -> list[str]:  # huggingface_hub reads its settings once in a process
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", FETCH, *repos]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return ask


def test_of_a_hubs_repository_an_adapters_files_are_fetched_once_and_of_a_large_one_none(
    locate_from: Callable[..., list[str]],
) -> None:
    files = {name: f"content of {name}".encode() for name in (*FILES, "optimizer.pt")}
    with serve_hub({"org/adapter": files, "org/huge": {WEIGHTS_FILE: bytes(1001)}}) as (endpoint, asked):
        found, again, huge, none = locate_from(endpoint, "org/adapter", "org/adapter", "org/huge", "org/none")
    assert (Path(found) / WEIGHTS_FILE).read_text() == f"content of {WEIGHTS_FILE}"
    assert again == found
    assert sorted(asked) == sorted(path.name for path in Path(found).iterdir()) == sorted(FILES)
    assert huge == "cannot be fetched from the Hub (it has 1001 bytes; 1000 are allowed)"
    assert "not in its cache (404 Client Error" in none
    assert locate_from(endpoint, "org/adapter") == [found]  # nobody is there any more


def test_a_folder_of_a_pinned_repository_is_asked_for_once(locate_from: Callable[..., list[str]]) -> None:
    files = {f"{folder}{name}": f"{folder}{name}".encode() for folder in ("", "x/", "xy/") for name in FILES}
    places = [f"org/many@{COMMIT}/x"] * 2
    with serve_hub({"org/many": files}) as (endpoint, asked):
        found, again = locate_from(endpoint, *places)
    assert found == again
    assert sorted(asked) == sorted(FILES)
    assert (Path(found) / WEIGHTS_FILE).read_text() == f"x/{WEIGHTS_FILE}"
    assert not (Path(found).parent / "xy").exists()
