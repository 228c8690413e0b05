"""The ledger: what counts as done, what is removed, and time that adds up over attempts."""

from pathlib import Path

import pytest

from pipeline.ledger import Ledger, digest
from pipeline.storage import Folder


def test_a_stage_is_done_for_its_key_alone(tmp_path: Path) -> None:
    with Ledger(Folder.at(tmp_path)).perform("search", "a", []) as details:
        details["tokens"] = 3
    again = Ledger(Folder.at(tmp_path))
    assert again.done("search")
    assert again.done("search", "a")
    assert not again.done("search", "b")
    assert again.records["search"]["details"] == {"tokens": 3}


def test_a_failed_attempt_is_not_done_keeps_its_outputs_and_its_time(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)

    def attempt() -> None:
        with Ledger(folder).perform("search", "a", ["scores"]):
            folder.write_text("scores/one", "1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attempt()
    first = Ledger(folder)
    assert not first.done("search", "a")
    spent = first.seconds("search")
    with first.perform("search", "a", ["scores"]):
        assert folder.exists("scores/one")
    assert first.seconds("search") > spent > 0


def test_another_key_removes_the_old_outputs_and_starts_the_clock_anew(tmp_path: Path) -> None:
    folder, ledger = Folder.at(tmp_path), Ledger(Folder.at(tmp_path))
    with ledger.perform("search", "a", ["scores"]):
        folder.write_text("scores/one", "1")
    ledger.records["search"]["seconds"] = 100.0
    with ledger.perform("search", "b", ["scores"]):
        assert not folder.exists("scores")
    assert ledger.seconds("search") < 100


def test_digest_depends_on_every_part() -> None:
    assert digest("a", {"x": 1}) == digest("a", {"x": 1})
    assert len({digest("a", {"x": 1}), digest("a", {"x": 2}), digest("b", {"x": 1}), digest(["a", {"x": 1}])}) == 4
