"""Bringing an adapter here: from a folder, the Hub's cache or an object store; what cannot be reached says so."""

from pathlib import Path

import pytest

from pipeline.errors import AdapterError
from pipeline.fetch import fetch_adapter
from pipeline.merge.adapter import FILES, WEIGHTS_FILE
from pipeline.storage import Folder


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


@pytest.mark.parametrize("repo", ["no-org/no-adapter", "not a valid id!", "a/b/c"])
def test_a_hub_id_that_is_not_in_the_cache_is_an_adapter_error(repo: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be fetched from the Hub"):
        fetch_adapter(f"hf://{repo}", tmp_path)
