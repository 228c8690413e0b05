"""What the study concludes from its tasks, and the rows that it is fed with."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.bigbench import name_of, rows_of
from benchmarks.paper import DATA_SETS
from benchmarks.study import _own, _targets, conclude, sign_flips
from benchmarks.study import main as study
from pipeline.core.errors import InputError


def row(task: str, base: float, mashup: float | None, paper: float | None = None, **more: Any) -> dict[str, Any]:
    found = {"base": base, "mashup": mashup, "paper": paper}
    inits = {init: {"exact_match": value, "token_accuracy": value} for init, value in found.items() if value is not None}
    verdict = "base" if mashup is None else "mashup"
    return {"task": task, "verdict": verdict, "inits": inits, "steps_saved": 0.5, "seconds_saved": 0.25, "worse": False} | more


def test_the_means_count_a_base_verdict_as_no_difference_and_missed_parity_as_nothing_saved() -> None:
    rows = [
        row("a", 0.5, 0.6, 0.55),
        row("b", 0.4, None, steps_saved=0.0, seconds_saved=-0.5),
        row("c", 0.3, 0.25, 0.35, steps_saved=None, seconds_saved=-0.2, worse=True),
    ]
    found = conclude(rows)
    assert (found["tasks"], found["mashups"], found["parity_reached"]) == (3, 2, 2)
    assert found["steps_saved"] == pytest.approx(0.5 / 3, abs=1e-3)
    assert found["seconds_saved"] == pytest.approx((0.25 - 0.5 - 0.2) / 3, abs=1e-3)
    assert found["exact_match"] == pytest.approx((10 + 0 - 5) / 3, abs=0.01)
    assert found["exact_match_over_paper"] == pytest.approx((5 - 10) / 2, abs=0.01)  # b was not compared with the paper's start
    assert found["worse_than_base"] == ["c"]


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1.0] * 5, 2 / 32), ([1.0, 2.0, 3.0], 2 / 8), ([0.0, 0.0], 1.0), ([5.0, -5.0], 1.0), ([3.0, 1.0, -1.0], 6 / 8)],
)
def test_sign_flips_are_counted_exactly(differences: list[float], p: float) -> None:
    assert sign_flips(differences) == pytest.approx(p)


def test_sign_flips_of_many_tasks_are_drawn() -> None:
    assert sign_flips([1.0] * 20) < 0.001
    assert sign_flips([(-1.0) ** n for n in range(20)]) == 1.0


def test_a_tasks_own_adapters_are_left_out() -> None:
    names = ["sums", "sums-2", "in/a/folder/sums-3", "sums-plus-3", "dates"]
    assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _own("sums"))] == ["sums-plus-3", "dates"]


def test_tasks_need_a_test_split(write_jsonl: Any, tmp_path: Path) -> None:
    for name, files in {"one": ("train", "validation"), "two": ("train", "validation", "test")}.items():
        (tmp_path / name).mkdir()
        for file in files:
            write_jsonl(tmp_path / name / f"{file}.jsonl", [])
    found = _targets([tmp_path])
    assert {name: Path(target["test"]).name for name, target in found.items()} == {"one": "validation.jsonl", "two": "test.jsonl"}
    (tmp_path / "one/validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"one: no test\.jsonl"):
        _targets([tmp_path])


def test_big_bench_examples_become_prompts_and_completions() -> None:
    task = {
        "task_prefix": "Choose. ",
        "examples": [
            {"input": "1 + 1?", "target_scores": {"3": 0, "2": 1}},
            {"input": "A word", "target": ["right", "also right"]},
            {"input": "nothing", "target": ""},
        ],
    }
    assert list(rows_of(task)) == [
        {"prompt": "Choose. 1 + 1?\nChoices:\n- 3\n- 2\nAnswer with one of the choices.", "completion": "2"},
        {"prompt": "Choose. A word", "completion": "right"},
    ]
    assert next(rows_of(task | {"task_prefix": "A page. " * 50}))["prompt"].startswith("1 + 1?")
    assert name_of("natural_instructions/subtask041_qasc_answer_generation") == "qasc_answer_generation"
    assert name_of("linguistic_mappings/sentence_negation_json") == "linguistic_mappings__sentence_negation"


PUBLISHED = {
    "arc_easy": {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    "commonsense_qa": {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "hellaswag": {"ctx": "C", "endings": ["x", "y"], "label": "1"},
    "math_qa": {"Problem": "P", "options": "a ) 1 , 000 , b ) 27.675 , c ) x , d ) none of these , e ) 5", "correct": "b"},
    "openbookqa": {"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "piqa": {"goal": "G", "sol1": "x", "sol2": "y", "label": 1},
    "social_iqa": {"context": "C", "question": "Q", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
    "winogrande": {"sentence": "S _", "option1": "x", "option2": "y", "answer": "2"},
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_of_the_papers_data_sets_ask_for_a_letter(name: str) -> None:
    found = DATA_SETS[name][1](PUBLISHED[name])
    assert found["completion"] == "B"
    assert ("\nB. 27.675\n" if name == "math_qa" else "\nB. y\n") in found["prompt"]
    if name == "math_qa":
        assert "\nA. 1 , 000\n" in found["prompt"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_session")
def test_the_study_trains_donors_on_its_tasks_and_goes_on_where_it_was(
    tiny_base: str, write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tasks that repeat one of two words; one is the other's donor."""
    words = ["fox", "dog", "river", "hotel", "review", "France"]
    for task, place in {"first": 0, "second": 1}.items():
        rows = [{"prompt": f"{a} and {b}", "completion": (a, b)[place]} for a in words for b in words]
        (tmp_path / "tasks" / task).mkdir(parents=True)
        for split, part in {"train": rows[6:], "test": rows[:6]}.items():
            write_jsonl(tmp_path / "tasks" / task / f"{split}.jsonl", part)
    settings = {
        "search": {"samples": 8, "engine": "transformers", "cpus_per_actor": 1},
        "epochs": 1,
        "train": {"batch_size": 8, "learning_rates": [5e-3], "evaluations": 1, "cpus_per_worker": 1},
        "compare": {"inits": ["base", "mashup"]},
        "donor": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    asked = {"base": tiny_base, "pool": "", "tasks": [tmp_path / "tasks"], "settings": tmp_path / "settings.yaml"}
    study(quick=False, only=["first"], work=tmp_path / "work", **asked)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tasks"] == 1
    (run,) = json.loads((tmp_path / "work/study.json").read_text())
    assert {Path(donor).name for donor in run["donors"]} <= {"second"}
    assert sorted(path.name for path in (tmp_path / "work/pool").iterdir()) == ["first", "second"]
    assert (tmp_path / "work/study.png").stat().st_size > 10_000

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    study(quick=False, only=["first"], work=tmp_path / "work", **asked)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")} == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
