"""The table that the study keeps: what is written is read, and only what lacks is run."""

from pathlib import Path

import pytest
from study_rows import absent, arm, mashup

from benchmarks.study_arms import add_arms, lacking, read_arms

ASKED = {"base": "tiny", "task": "sums", "settings": "s", "inputs": "i"}


def test_arms_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results/arms.csv"
    assert read_arms(file) == []
    first, later = [arm(), mashup(recipe="exact-2, gains", donors='one "two"')], [absent("paper", charged_seconds=None)]
    add_arms(file, first)
    add_arms(file, later)
    assert read_arms(file) == first + later
    assert len(file.read_text().splitlines()) == 4


def test_the_last_row_of_an_arm_counts_and_a_line_cut_short_does_not(tmp_path: Path) -> None:
    file = tmp_path / "arms.csv"
    add_arms(file, [arm(seed=0), arm(seed=1)])
    file.write_text(file.read_text()[:-20])
    assert [one.seed for one in read_arms(file)] == [0]
    add_arms(file, [arm(seed=0, test_nll=0.5), arm(seed=2)])
    assert [(one.seed, one.test_nll) for one in read_arms(file)] == [(0, 0.5), (2, 1.1)]


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "arms.csv").write_text("base,task\n")
    with pytest.raises(ValueError, match="column 'init' is missing"):
        read_arms(tmp_path / "arms.csv")


def test_only_what_lacks_is_run_with_starts_that_there_are_not_done() -> None:
    done = [arm(), absent("mashup", verdict="base"), arm(seed=1)]
    assert lacking(done, ASKED, ["base", "mashup"], [0]) == {}
    found = lacking(done, ASKED, ["base", "mashup", "eva"], [0, 1, 2, 3])
    assert found == {("eva",): [0], ("mashup", "eva"): [1], ("base", "mashup", "eva"): [2, 3]}


@pytest.mark.parametrize("other", ["base", "task", "settings", "inputs"])
def test_what_was_made_of_something_else_is_run_again(other: str) -> None:
    assert lacking([arm()], ASKED | {other: "another"}, ["base"], [0]) == {("base",): [0]}
