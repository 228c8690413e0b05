"""The ledger: what counts as done, what is removed, and time that adds up over attempts."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from pipeline.core.ledger import Ledger, Outputs, digest
from pipeline.core.storage import Folder

STAGES = {"search": Outputs(["board"], work=["scores"]), "merge": Outputs(["selection"], work=["candidates"])}


def ledger(folder: Path) -> Ledger:
    return Ledger(Folder.at(folder), STAGES)


def test_a_stage_is_done_for_its_key_alone(tmp_path: Path) -> None:
    with ledger(tmp_path).perform("search", "a") as details:
        details["tokens"] = 3
    again = ledger(tmp_path)
    assert again.done("search")
    assert again.done("search", "a")
    assert not again.done("search", "b")
    assert again.records["search"]["details"] == {"tokens": 3}


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("name", ["board.parquet", "about.json", "data/rows.parquet", "mashup/weights.safetensors"])
def test_a_stage_whose_result_is_cut_short_or_gone_is_not_done(name: str, gone: bool, tmp_path: Path) -> None:
    folder, stages = Folder.at(tmp_path), {"search": Outputs(["board.parquet", "about.json", "data", "mashup"])}
    with Ledger(folder, stages).perform("search", "a"):
        for table in ("board.parquet", "data/rows.parquet"):
            folder.write_table(table, pa.table({"n": [1, 2]}))
        folder.write_json("about.json", {"n": 1})
        folder.write_bytes("mashup/weights.safetensors", save({"a": torch.ones(3)}))
    assert Ledger(folder, stages).done("search", "a")
    cut = (tmp_path / name).read_bytes()[:-5]
    (tmp_path / name).unlink()
    if not gone:
        (tmp_path / name).write_bytes(cut)
    assert not Ledger(folder, stages).done("search", "a")


DAMAGED = ["", '{"search": {"ke', "[]", "5", '{"search": 5}', '{"search": {"done": true}}', "\x00\x00", None]
"""Contents of a ledger that cannot be read; None: it is gone."""


def damage(file: Path, content: str | None) -> None:
    file.write_text(content) if content is not None else file.unlink()


@pytest.mark.parametrize("content", DAMAGED)
def test_where_the_ledger_cannot_be_read_its_backup_is_used_and_that_is_said(content: str | None, tmp_path: Path) -> None:
    with ledger(tmp_path).perform("search", "a") as details:
        details["adapters"] = 3
    damage(tmp_path / "stages.json", content)
    said: list[str] = []
    found = Ledger(Folder.at(tmp_path), STAGES, say=said.append)
    assert found.done("search", "a")
    assert found.records["search"]["details"] == {"adapters": 3}
    assert len(said) == 1
    assert said[0].startswith("stages.json ")
    assert said[0].endswith("stages.backup.json is used in its place")
    with found.perform("merge", "b"):
        pass
    assert ledger(tmp_path).done("search", "a")


@pytest.mark.parametrize("content", DAMAGED)
def test_where_neither_can_be_read_it_is_said_that_nothing_is_known(content: str | None, tmp_path: Path) -> None:
    with ledger(tmp_path).perform("search", "a"):
        pass
    (tmp_path / "stages.json").write_text("")
    damage(tmp_path / "stages.backup.json", content)
    said: list[str] = []
    assert not Ledger(Folder.at(tmp_path), STAGES, say=said.append).done("search")
    assert said[-1].endswith("what is done is not known: all stages are done again, with the scores of the store")


def test_a_new_folder_has_no_ledger_and_nothing_is_said_of_it(tmp_path: Path) -> None:
    said: list[str] = []
    assert Ledger(Folder.at(tmp_path), STAGES, say=said.append).records == {}
    assert said == []


def test_the_backup_does_not_vouch_for_results_of_another_input(tmp_path: Path) -> None:
    """An attempt with a new key is killed after its results are there; then the ledger is damaged."""
    folder = Folder.at(tmp_path)
    with ledger(tmp_path).perform("search", "a"):
        folder.write_json("board", {"key": "a"})
    killed = ledger(tmp_path).perform("search", "b")  # never left
    killed.__enter__()
    folder.write_json("board", {"key": "b"})
    (tmp_path / "stages.json").write_text("")
    assert not ledger(tmp_path).done("search", "a")


def test_results_are_removed_once_both_files_say_that_the_stage_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ledger(tmp_path).perform("search", "a"):
        Folder.at(tmp_path).write_text("board", "1")
    again, done = ledger(tmp_path), list[bool]()

    def delete(self: Folder, name: str) -> None:
        done.extend(json.loads((tmp_path / file).read_text())["search"]["done"] for file in ("stages.json", "stages.backup.json"))

    monkeypatch.setattr(Folder, "delete", delete)
    with again.perform("search", "b"):
        pass
    assert done
    assert not any(done)


def test_work_that_could_not_be_removed_does_not_pass_for_that_of_the_new_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between the first and the last of the removals; the next attempt removes it."""
    folder = Folder.at(tmp_path)

    def attempt(key: str) -> None:
        with ledger(tmp_path).perform("merge", key):
            assert not folder.exists("candidates") or key == "a"
            folder.write_text("candidates/one", key)

    def delete(self: Folder, name: str) -> None:
        raise KeyboardInterrupt

    attempt("a")
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            attempt("b")
    assert folder.read_text("candidates/one") == "a"
    attempt("b")
    assert folder.read_text("candidates/one") == "b"


def test_a_new_run_that_is_killed_before_it_removes_anything_leaves_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would be said to be damaged."""

    def delete(self: Folder, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "delete", delete)
    with pytest.raises(KeyboardInterrupt), ledger(tmp_path).perform("search", "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_failed_attempt_is_not_done_and_keeps_its_work_and_its_time(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)

    def attempt() -> None:
        with ledger(tmp_path).perform("search", "a"):
            folder.write_text("scores/one", "1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attempt()
    second = ledger(tmp_path)
    assert not second.done("search", "a")
    spent = second.seconds("search")
    with second.perform("search", "a"):
        assert folder.exists("scores/one")
    assert second.seconds("search") > spent > 0
    (began, failed), (again, end) = ledger(tmp_path).records["search"]["spans"]
    assert began <= failed <= again <= end


def test_what_is_spent_outside_of_the_stages_is_told_with_its_time(tmp_path: Path) -> None:
    this = ledger(tmp_path)
    this.note("ray", 3.0)
    this.note("ray", 2.0)
    assert this.seconds("ray") == 5.0
    assert [end - began for began, end in ledger(tmp_path).records["ray"]["spans"]] == pytest.approx([3, 2], abs=0.1)


def test_another_key_removes_what_was_left_and_starts_the_clock_anew(tmp_path: Path) -> None:
    folder, this = Folder.at(tmp_path), ledger(tmp_path)
    with this.perform("search", "a"):
        folder.write_text("scores/one", "1")
        folder.write_text("board", "1")
    this.records["search"]["seconds"] = 100.0
    with this.perform("search", "b"):
        assert not folder.exists("scores")
        assert not folder.exists("board")
    assert this.seconds("search") < 100


def test_a_stage_that_runs_again_opens_those_after_it_but_keeps_their_work(tmp_path: Path) -> None:
    folder, this = Folder.at(tmp_path), ledger(tmp_path)
    for stage, names in {"search": ["board"], "merge": ["selection", "candidates/one"]}.items():
        with this.perform(stage, "a"):
            for name in names:
                folder.write_text(name, "1")
    with this.perform("search", "b"):
        pass
    assert not this.done("merge", "a")
    assert not folder.exists("selection")
    assert folder.exists("candidates/one")


def test_digest_depends_on_every_part() -> None:
    assert digest("a", {"x": 1}) == digest("a", {"x": 1})
    assert len({digest("a", {"x": 1}), digest("a", {"x": 2}), digest("b", {"x": 1}), digest(["a", {"x": 1}])}) == 4


class LostError(Exception):
    pass


def test_who_may_not_write_any_more_changes_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise LostError

    folder = Folder.at(tmp_path)
    with ledger(tmp_path).perform("search", "a"):
        folder.write_text("board", "a")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    again = Ledger(folder, STAGES, check=lost)
    with pytest.raises(LostError), again.perform("search", "b"):
        pass
    with pytest.raises(LostError):
        again.note("ray", 2.0)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_who_loses_the_right_to_write_during_a_stage_does_not_call_it_done(tmp_path: Path) -> None:
    held = True

    def check() -> None:
        if not held:
            raise LostError

    attempt = Ledger(Folder.at(tmp_path), STAGES, check=check).perform("search", "a")
    attempt.__enter__()
    files, held = {file: file.read_bytes() for file in tmp_path.iterdir()}, False
    with pytest.raises(LostError):
        attempt.__exit__(None, None, None)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert not ledger(tmp_path).done("search")
