"""Scores on their way into the store: behind the race, a file a second, and again where the store did not answer."""

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.storage import Folder
from pipeline.search import score_writer
from pipeline.search.score_store import ScoreStore, read_failures
from pipeline.search.score_writer import ScoreWriter

HASHES = {f"a{n}": f"hash-{n}" for n in range(50)}


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    return ScoreStore.at(str(tmp_path), "base", "vllm", "float32")


@pytest.fixture
def writer(store: ScoreStore, tmp_path: Path) -> Iterator[ScoreWriter]:
    writer = ScoreWriter(store, HASHES, Folder.at(tmp_path / "failures"))
    yield writer
    writer.close()


@pytest.fixture
def scores(drawn_scores: Callable[..., pa.Table]) -> pa.Table:
    return drawn_scores(list(HASHES), ["s0", "s1"])


def stored(store: ScoreStore) -> pa.Table:
    return pa.concat_tables([store.folder.read_table(name) for name in store.files()])


def test_what_many_engines_report_in_a_second_is_one_file(store: ScoreStore, writer: ScoreWriter, scores: pa.Table) -> None:
    writer.add(scores.slice(0, 2), {})
    while not writer.written:
        time.sleep(0.01)
    for row in range(2, 100):
        writer.add(scores.slice(row, 1), {})
    writer.flush(10)
    assert writer.written == 100
    assert len(store.files()) == 2
    assert writer.files == set(store.files())
    found = stored(store)
    assert (
        found.select(scores.column_names)
        .sort_by([("adapter_id", "ascending"), ("sample_id", "ascending")])
        .equals(scores.sort_by([("adapter_id", "ascending"), ("sample_id", "ascending")]))
    )
    assert [HASHES[name] for name in found["adapter_id"].to_pylist()] == found["adapter_hash"].to_pylist()


def test_failures_are_kept_with_them(writer: ScoreWriter, scores: pa.Table, tmp_path: Path) -> None:
    writer.add(scores.slice(0, 0), {"a1": "corrupt", "a2": "gone"})
    writer.flush(10)
    assert read_failures(Folder.at(tmp_path / "failures")) == {"a1": "corrupt", "a2": "gone"}
    assert writer.written == 0


def failing(monkeypatch: pytest.MonkeyPatch, error: OSError, times: int, name: str = "write_table") -> list[str]:
    """The store refuses so many writes."""
    refused, right = list[str](), getattr(Folder, name)

    def write(folder: Folder, file: str, *args: Any) -> None:
        if len(refused) < times:
            refused.append(file)
            raise error
        right(folder, file, *args)

    monkeypatch.setattr(Folder, name, write)
    monkeypatch.setattr(score_writer, "PAUSES", (0.01,))
    return refused


def test_a_store_that_does_not_answer_is_asked_again_and_nobody_waits_for_it(
    store: ScoreStore, writer: ScoreWriter, scores: pa.Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = failing(monkeypatch, OSError("AWS Error SLOW_DOWN"), times=5)
    writer.add(scores.slice(0, 50), {"a1": "corrupt"})
    while len(refused) < 3:
        time.sleep(0.01)
    writer.add(scores.slice(50), {"a2": "gone"})
    writer.require_sound()
    writer.flush(10)
    assert writer.written == len(stored(store)) == 100
    assert read_failures(Folder.at(tmp_path / "failures")) == {"a1": "corrupt", "a2": "gone"}


def test_a_store_that_never_answers_is_an_error_at_the_end(
    writer: ScoreWriter, scores: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), times=10**6)
    writer.add(scores, {})
    writer.require_sound()
    with pytest.raises(OSError, match="No space left"):
        writer.flush(0.2)


def test_what_will_never_pass_is_raised_to_whoever_reports_next(
    writer: ScoreWriter, scores: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, PermissionError("no write permission"), times=10**6)
    writer.add(scores, {})
    with pytest.raises(PermissionError):
        writer.flush(10)
    with pytest.raises(PermissionError):
        writer.add(scores, {})
    with pytest.raises(PermissionError):
        writer.require_sound()


def test_a_failure_that_could_not_be_written_does_not_write_the_scores_again(
    store: ScoreStore, writer: ScoreWriter, scores: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, times = score_writer.record_failures, list[int]()

    def record(folder: Folder, failures: dict[str, str]) -> None:
        times.append(1)
        if len(times) == 1:
            raise OSError("AWS Error SLOW_DOWN")
        right(folder, failures)

    monkeypatch.setattr(score_writer, "record_failures", record)
    monkeypatch.setattr(score_writer, "PAUSES", (0.01,))
    writer.add(scores, {"a1": "corrupt"})
    writer.flush(10)
    assert len(times) == 2
    assert len(stored(store)) == 100


def test_the_name_of_a_file_is_known_before_it_is_there(
    store: ScoreStore, writer: ScoreWriter, scores: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a race would read its own scores where it lists the store in between."""
    known, right = [], Folder.write_table

    def write(folder: Folder, name: str, *asked: Any) -> None:
        known.append(name in writer.files)
        right(folder, name, *asked)

    monkeypatch.setattr(Folder, "write_table", write)
    writer.add(scores, {})
    writer.flush(10)
    assert known == [True]
