"""What is scored is what was indexed: looked at once, and again where its files changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.adapters.adapter import CHANGED, hash_of
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.engines.scorer import Candidate
from pipeline.search import indexed
from pipeline.search.indexed import IndexedAdapters


@pytest.fixture
def adapter(tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "a", tiny_base)


def test_another_adapter_is_refused_and_so_is_none(adapter: Path) -> None:
    known, adapters = hash_of(adapter), IndexedAdapters()
    adapters.require(Candidate("a", adapter), known)
    with pytest.raises(AdapterError, match=CHANGED):
        adapters.require(Candidate("a", adapter), "another")
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError):
        adapters.require(Candidate("a", adapter), known)


def test_what_has_the_state_that_it_had_when_it_was_indexed_is_not_read(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(indexed, "require_hash", lambda folder, expected: read.append(expected))
    for name, known, now in (("same", "s", "s"), ("changed", "s", "t"), ("never known", None, None), ("not told", "s", None)):
        IndexedAdapters().require(Candidate("a", adapter), name, known, now)
    assert read == ["changed", "never known", "not told"]


def test_files_that_did_not_change_are_read_once(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(indexed, "require_hash", lambda folder, expected: read.append(folder))
    adapters, candidate = IndexedAdapters(), Candidate("a", adapter)
    for _ in range(2):
        adapters.require(candidate, "hash")
    assert len(read) == 1
    assert adapters.changed([candidate, Candidate("base", None)]) == {}
    (adapter / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes())
    assert adapters.changed([candidate]) == {"a": CHANGED}
    adapters.require(candidate, "hash")
    assert len(read) == 2
