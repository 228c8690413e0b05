"""A metric of one's own: what is refused before anything is trained, what is kept, and what the rows say."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Config, build_config
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import ANSWERS, METRIC_ROWS, TEST
from pipeline.data.tokenise import Reading, tokenise
from pipeline.model.base_model import load_tokenizer
from pipeline.run_folder import Run
from pipeline.train import metric
from pipeline.train.arm import Job
from pipeline.train.metric import MAX_PROMPT, TRIED, check, measure, metric_key, try_out

pytestmark = pytest.mark.timeout(120)

SHARE = "len(set(a.split()) & set(r.split())) / len(r.split()) for a, r in zip(answers, references)"


@pytest.fixture
def run(tiny_base: str, tmp_path: Path) -> Callable[..., Run]:
    """run(metric, *rows): with these rows as its test split."""

    def make(name: str, *rows: dict[str, Any]) -> Run:
        content = {"run": str(tmp_path / "run"), "base": tiny_base, "pool": "p", "target": {"train": "t"}}
        made = Run(build_config({**content, "compare": {"metric": name}}, "test"))
        tokens = [tokenise(row, load_tokenizer(tiny_base), Reading(choices=True)) for row in rows]
        table = [{"sample_id": digest(one["input_ids"]), "split": "test", **one} for one in tokens]
        made.folder.write_table("data/test.parquet", pa.Table.from_pylist(table, schema=TEST))
        return made

    return make


def row(answer: str, prompt: str = "Where?", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, **more}


@pytest.mark.parametrize("named", ["own_metric:f", "no_such_module:f"])
def test_a_function_that_is_not_there_is_refused(named: str, module: Callable[[str], str]) -> None:
    module(SHARE)
    with pytest.raises(InputError, match=r"compare\.metric: "):
        check(named)


def test_a_task_needs_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.harness.find_spec", lambda name: None)
    with pytest.raises(InputError, match="install lm-eval"):
        check("lm_eval:arc_easy")


@pytest.mark.parametrize("named", [None, "choices", "exact_match", "own_metric:share"])
def test_what_is_there_is_not_refused(named: str | None, module: Callable[[str], str]) -> None:
    module(SHARE)
    check(named)


def test_a_function_that_gives_too_little_is_refused_before_training(
    module: Callable[[str], str], run: Callable[..., Run]
) -> None:
    with pytest.raises(InputError, match="gave 1 numbers for 2 rows; it must give one a row"):
        try_out(run(f"{module('1.0')}:share", row("Here."), row("There."), row("Anywhere.")))


def test_a_function_is_tried_on_right_answers_of_a_few_rows(module: Callable[[str], str], run: Callable[..., Run]) -> None:
    try_out(run(f"{module(SHARE)}:share", *(row(f"It is {n}.") for n in range(5))))
    assert sys.modules["own_metric"].calls == [TRIED]


@pytest.mark.parametrize("choices", [None, ["Here.", "There."], ["It is 1."], "It is 1."])
@pytest.mark.parametrize("name", ["choices", "choices_per_token"])
def test_rows_without_the_right_choice_are_counted_and_refused(name: str, choices: Any, run: Callable[..., Run]) -> None:
    good = row("Here.", choices=["There.", "Here."])
    try_out(run(name, good, good))
    with pytest.raises(InputError, match=f"compare.metric {name}: 1 of 2 rows of the test split have no `choices`"):
        try_out(run(name, good, row("It is 1.", choices=choices)))


def test_a_test_split_that_an_older_version_drew_has_no_choices(run: Callable[..., Run]) -> None:
    asked = run("choices", row("Here."))
    old = asked.folder.read_table("data/test.parquet").drop_columns(["choices"])
    asked.folder.write_table("data/test.parquet", old)
    assert metric_key("choices", asked.folder.sub("data"))
    with pytest.raises(InputError, match=r"1 of 1 rows .* `mashup run` reads them anew"):
        try_out(asked)


def test_rows_of_text_alone_have_nothing_to_write_from(run: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match="text alone, without a prompt"):
        try_out(run("exact_match", {"text": "The capital of France is Paris."}))


def test_no_metric_looks_at_nothing(config_for: Callable[..., Config], tmp_path: Path) -> None:
    try_out(Run(config_for("t").model_copy(update={"run": str(tmp_path)})))


def test_a_key_is_of_rows_choices_and_the_functions_source(module: Callable[[str], str], run: Callable[..., Run]) -> None:
    def key(name: str, choices: Sequence[str] = ("Here.", "There."), answer: str = "Here.") -> str:
        return metric_key(name, run(name, row(answer, choices=[*choices])).folder.sub("data"))

    assert key("choices") == key("choices")
    assert len({key("choices"), key("choices_per_token"), key("choices", ("Here.", "Where?")), key("exact_match")}) == 4
    assert key("exact_match") == key("exact_match", ("Here.", "Where?")) != key("exact_match", answer="There.")
    own = f"{module(SHARE)}:share"
    before = key(own)
    module("1.0 for a in answers")
    assert key(own) != before


def arm(init: str, seed: int, lr: float = 1e-3) -> dict[str, Any]:
    name = f"{init}-{seed}"
    return {"name": name, "init": init, "lr": lr, "seed": seed, "checkpoint": f"{name}/checkpoint_1"}


ARMS = {"base": [arm("base", 0), arm("base", 1)], "mashup": [arm("mashup", 0), arm("mashup", 1)], "paper": [arm("paper", 0)]}


@pytest.fixture
def measured(
    run: Callable[..., Run], job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[metric.Measured, list[str]]]:
    """measured(metric, arms): what is found where each arm answers with its own name, and which arms were asked."""
    asked: list[str] = []

    def answered(name: str, job: Job, checkpoints: dict[str, Folder], storage: Folder) -> Iterator[tuple[str, pa.Table]]:
        asked.extend(checkpoints)
        for arm in checkpoints:
            rows = [
                {
                    "sample_id": f"s{n}",
                    "prompt": "p" * 10**n,
                    "reference": "base-0",
                    "answer": arm,
                    "score": 0.5 if "choices" in name else None,
                }
                for n in range(5)
            ]
            yield arm, pa.Table.from_pylist(rows, schema=ANSWERS)

    monkeypatch.setattr(metric, "_answered", answered)

    def found(name: str, arms: Any = ARMS, answer: str = "Here.") -> tuple[metric.Measured, list[str]]:
        asked.clear()
        data = run(name, row(answer, choices=[answer, "There."])).folder.sub("data")
        return measure(name, replace(job(), data=data), arms, Folder.at(tmp_path / "train")), list(asked)

    return found


def test_means_are_of_each_arm_and_rows_of_base_and_mashup_by_seed(measured: Callable[..., Any]) -> None:
    found, asked = measured("exact_match")
    assert found.answered == len(asked) == 5
    assert found.means == {"base": [1.0, 0.0], "mashup": [0.0, 0.0], "paper": [0.0]}
    assert found.rows.schema == METRIC_ROWS
    first = found.rows.to_pylist()[0]
    assert first == {
        "sample_id": "s0",
        "seed": 0,
        "prompt": "p",
        "reference": "base-0",
        "base_answer": "base-0",
        "base_score": 1.0,
        "mashup_answer": "mashup-0",
        "mashup_score": 0.0,
    }
    assert found.rows["seed"].to_pylist() == [0] * 5 + [1] * 5
    assert max(map(len, found.rows["prompt"].to_pylist())) == MAX_PROMPT + 3


@pytest.mark.parametrize("inits", [["base"], ["mashup", "paper"], ["paper"]])
def test_a_start_that_is_not_there_leaves_its_columns_empty(inits: list[str], measured: Callable[..., Any]) -> None:
    rows = measured("choices", {init: ARMS[init] for init in inits})[0].rows
    assert len(rows) == (0 if inits == ["paper"] else 10)
    for init in ("base", "mashup"):
        assert rows[f"{init}_score"].null_count == (0 if init in inits else len(rows))


def test_what_was_answered_or_scored_is_not_done_again(measured: Callable[..., Any], module: Callable[[str], str]) -> None:
    """But on other rows it is; and all that is written serves each metric over it."""
    own = f"{module(SHARE)}:share"
    first, asked = measured(own, {"base": ARMS["base"]})
    assert asked == ["base-0", "base-1"]
    again, asked = measured(own)
    assert asked == ["mashup-0", "mashup-1", "paper-0"]
    assert sys.modules["own_metric"].calls == [5] * 5
    assert again.means["base"] == first.means["base"] == [1.0, 0.0]
    assert measured("exact_match")[1] == []
    assert len(measured("choices")[1]) == 5
    assert len(measured("choices")[1]) == 0
    assert len(measured("exact_match", answer="Elsewhere.")[1]) == 5


def test_a_changed_function_scores_anew_what_was_written(measured: Callable[..., Any], module: Callable[[str], str]) -> None:
    own = f"{module(SHARE)}:share"
    measured(own)
    module("2.0 for a in answers")
    found, asked = measured(own)
    assert asked == []
    assert found.means["base"] == [2.0, 2.0]
