"""Tables and figures of the study, from its table of arms alone."""

from dataclasses import replace
from pathlib import Path

import pytest
from study_rows import absent, arm, mashup

from benchmarks.study_arms import FILE, StudyArm, add_arms
from benchmarks.study_tables import RESULTS, Table, current, differences, main, saved, tasks_of, write_tables


def study(base: str = "tiny") -> list[StudyArm]:
    """Three tasks: one on which the mashup gains 20 points, one with a base verdict, one on which it loses 5 without parity."""
    lost = {"task": "dates", "kin": False, "test_exact_match": 0.45, "validation_nll": (2.0, 1.5, 1.2)}
    on_base = {"task": "units", "kin": False, "verdict": "base", "recipe": ""}
    arms = [
        *(arm(), mashup(), mashup(init="paper", test_exact_match=0.6)),
        *(arm(**on_base), absent("mashup", **on_base)),
        *(arm(task="dates", kin=False), mashup(**lost)),
    ]
    return [replace(one, base=base) for one in arms]


def test_a_base_verdict_is_no_difference_and_missed_parity_saves_nothing() -> None:
    tasks = tasks_of(study())
    assert [task.name for task in tasks] == ["sums", "units", "dates"]
    assert differences(tasks, "base", "exact_match") == pytest.approx([20, 0, -5])
    assert differences(tasks, "paper", "exact_match") == pytest.approx([10])  # the others were not compared with it
    assert saved(tasks, "steps") == pytest.approx([50, 0, 0])
    assert saved(tasks, "seconds") == pytest.approx([0, -50, -50])


def test_two_bases_are_averaged_within_a_task() -> None:
    as_good = mashup(base="other", test_exact_match=0.5)
    other = [as_good if (one.init, one.task) == ("mashup", "sums") else one for one in study("other")]
    assert differences(tasks_of([*study(), *other]), "base", "exact_match") == pytest.approx([10, 0, -5])


def test_arms_of_other_settings_are_left_out_and_said() -> None:
    kept, notes = current([arm(settings="old"), *study()])
    assert kept == study()
    assert notes == ["1 arms of other settings are left out."]


def test_all_is_made_from_the_table_alone(tmp_path: Path) -> None:
    add_arms(tmp_path / FILE, [*study("a/b_1"), *study("tiny")])
    text = write_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == text
    assert "| sums | yes | exact-1 | 0.50 | 50 s / 100 s | 1.100, 50.0 |" in text
    assert "| units | no | base | verdict base |" in text
    assert "| exact match, mashup minus base, points | +5.00 [" in text
    assert "2 without kin; worse than the base beyond noise: none" in text
    assert "fewer than the 12 tasks" in text
    assert "All 2 bases" in text
    latex = (tmp_path / "tables.tex").read_text()
    assert r"a/b\_1" in latex or "% a/b_1" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == text.count("**") // 2
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["curves-a-b_1.png", "curves-tiny.png"]
    add_arms(tmp_path / FILE, [mashup(init="paper", task="units", kin=False, verdict="base")])
    assert write_tables(tmp_path) != text


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no arm is in it"):
        write_tables(tmp_path)


def test_latex_has_no_sign_that_it_reads_otherwise() -> None:
    found = Table("t", ["a_b", "50 %"], [["1 & 2", "3.1 ± 0.2"]]).latex()
    assert r"a\_b & 50 \% \\" in found
    assert r"1 \& 2 & 3.1 $\pm$ 0.2 \\" in found


@pytest.mark.parametrize("file", RESULTS.glob(f"*/{FILE}"), ids=lambda file: file.parent.name)
def test_the_tables_of_the_results_that_are_kept_can_be_made_again(file: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(file.read_bytes())
    main([tmp_path])
    assert (file.parent / "tables.md").read_text() == (tmp_path / "tables.md").read_text()
