"""What the study concludes from its tasks, and the rows that it is fed with."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_rows import absent, arm, mashup

from benchmarks.bigbench import name_of, rows_of
from benchmarks.paper import DATA_SETS
from benchmarks.study import SETTINGS, _config, _own, _targets, conclude, settings_digest
from benchmarks.study import main as study
from benchmarks.study_arms import add_arms, read_arms
from pipeline.core.errors import InputError
from pipeline.train.arm import Lora


def test_what_the_tasks_of_a_table_say_together(tmp_path: Path) -> None:
    file = tmp_path / "arms.csv"
    lost = {"task": "dates", "test_exact_match": 0.25, "validation_nll": (2.0, 1.5, 1.2)}
    base = {"task": "units", "verdict": "base", "kin": False}
    add_arms(file, [arm(), mashup(), arm(**base), absent("mashup", **base), arm(task="dates"), mashup(**lost), arm(task="other")])
    found = conclude(file, ["sums", "units", "dates"])
    assert (found["tasks"], found["without_kin"], found["mashups"], found["parity_reached"]) == (3, 1, 2, 2)
    assert found["steps_saved"] == pytest.approx(0.5 / 3, abs=1e-3)
    assert found["seconds_saved"] == pytest.approx((0 - 0.5 - 0.5) / 3, abs=1e-3)
    assert found["exact_match"] == pytest.approx((20 + 0 - 25) / 3, abs=0.01)
    low, high = found["exact_match_interval"]
    assert low < found["exact_match"] < high
    assert found["worse_than_base"] == ["dates"]


def test_settings_that_change_no_arm_do_not_count() -> None:
    asked = {"base": "b", "train": {"steps": 8, "seeds": [0]}, "compare": {"inits": ["base"]}, "families": []}
    same = {
        "base": "c",
        "train": {"steps": 8, "seeds": [0, 1], "workers": 2},
        "compare": {"inits": ["base", "eva"]},
        "search": {},
    }
    assert settings_digest(asked) == settings_digest(same)
    assert settings_digest(asked) != settings_digest(asked | {"train": {"steps": 9}})
    assert settings_digest(asked) != settings_digest(asked | {"reported": "validation"})


def test_a_tasks_own_adapters_are_left_out() -> None:
    names = ["sums", "sums-2", "in/a/folder/sums-3", "sums-plus-3", "dates"]
    assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _own("sums"))] == ["sums-plus-3", "dates"]


def test_tasks_need_a_test_split(write_jsonl: Any, tmp_path: Path) -> None:
    for name, files in {"one": ("train", "validation"), "two": ("train", "validation", "test")}.items():
        (tmp_path / name).mkdir()
        for file in files:
            write_jsonl(tmp_path / name / f"{file}.jsonl", [])
    found = _targets([tmp_path], "test")
    assert {name: Path(target["test"]).name for name, target in found.items()} == {"one": "validation.jsonl", "two": "test.jsonl"}
    (tmp_path / "one/validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"one: no test\.jsonl"):
        _targets([tmp_path], "test")


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


LABELS = {"arc_easy": "12", "math_qa": "abcde", "social_iqa": "123", "winogrande": "01"}
"""Where they are no capital letters."""


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_of_the_papers_data_sets_ask_for_its_labels(name: str) -> None:
    found, labels = DATA_SETS[name][1](PUBLISHED[name]), LABELS.get(name, "AB")
    assert found["completion"] == labels[1]
    assert (f"\n{labels[1]}. 27.675\n" if name == "math_qa" else f"\n{labels[1]}. y\n") in found["prompt"]
    assert found["prompt"].endswith(f"Answer with the {'number' if labels[0].isdigit() else 'letter'} alone.")
    if name == "math_qa":
        assert "\na. 1 , 000\n" in found["prompt"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["study", "paper", "paper_full"])
def test_settings_are_of_a_run(name: str, tmp_path: Path) -> None:
    """And the paper's have 256 rows to rank donors on."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 100)
    asked = yaml.safe_load((SETTINGS.parent / f"{name}.yaml").read_text())
    keys = {key: value for key, value in asked.items() if key not in ("donor", "families", "reported")}
    target = {"train": str(tmp_path / "train.jsonl"), asked.get("reported", "test"): str(tmp_path / "other.jsonl")}
    config = _config(keys | {"base": "b"}, tmp_path / "run", target)
    assert config.train.steps == (24 if name == "study" else 4)
    assert Lora(**asked["donor"]).rank == 8
    if name != "study":
        assert config.search.samples - round(config.search.samples * config.search.holdout) == 256
        assert (config.search.rank_by, config.search.draw, config.train.warmup) == ("token_accuracy", "first", 0.1)


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
        "families": ["first", "*"],
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    asked = {"base": tiny_base, "pool": "", "tasks": [tmp_path / "tasks"], "settings": tmp_path / "settings.yaml"}
    asked |= {"quick": False, "only": ["first"], "results": tmp_path / "results"}
    study(work=tmp_path / "work", **asked)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tasks"] == 1
    arms = read_arms(tmp_path / "results/arms.csv")
    assert {(one.init, one.seed, one.kin) for one in arms} == {("base", 0, True), ("mashup", 0, True)}
    assert {Path(donor).name for one in arms for donor in one.donors.split()} <= {"second"}
    assert sorted(path.name for path in (tmp_path / "work/pool").iterdir()) == ["first", "second"]
    assert (tmp_path / "results/curves-tiny-base.png").stat().st_size > 10_000

    study(work=tmp_path / "elsewhere", **asked)  # all is in the table: nothing is run, whatever the machine
    assert not (tmp_path / "elsewhere").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
