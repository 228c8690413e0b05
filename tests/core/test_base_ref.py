"""Names and versions of base models."""

from pathlib import Path

import pytest

from pipeline.core.base_ref import name_of, pinned, split, state_of
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_version_is_what_stands_behind_the_last_sign() -> None:
    assert split("org/base") == ("org/base", None)
    assert split("org/base@v1.0") == ("org/base", "v1.0")
    assert split("s3://bucket/a@b") == ("s3://bucket/a@b", None)
    assert split("s3://bucket/a@b@state-0123456789abcdef") == ("s3://bucket/a@b", "state-0123456789abcdef")
    assert name_of(f"org/base@{COMMIT}") == "org/base"


def test_local_folders_and_pinned_bases_are_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split(str(folder)) == (str(folder), None)
    for base in (str(folder), str(tmp_path / "none"), f"org/base@{COMMIT}"):
        assert pinned(base) == base


def test_a_base_of_an_object_store_is_pinned_to_the_state_of_its_files(bucket: str) -> None:
    uri = f"{bucket}/base"
    with pytest.raises(InputError, match="nothing is there"):
        pinned(uri)
    Folder.at(uri).write_text("config.json", "{}")
    first = pinned(uri)
    assert first == f"{uri}@{state_of(uri)}"
    assert pinned(first) == first
    Folder.at(uri).write_text("config.json", "{ }")
    assert pinned(uri) != first
    assert pinned(first) == first
