"""Tasks of lm-eval: what they score, and what is refused. Without the extra `eval` the first is not run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.core.tables import ANSWERS, TEST
from pipeline.data.tokenise import Reading, tokenise
from pipeline.train import harness
from pipeline.train.answers import answers_on_test
from pipeline.train.harness import _first_filter, _said, answer_task, require_harness, require_task, task_key

pytestmark = pytest.mark.timeout(300)

WORDS = ["fox", "the river near the bank", "dog", "42"]
KINDS: dict[str, dict[str, Any]] = {
    "chosen": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"},
    "written": {"output_type": "generate_until", "doc_to_target": "{{choices[label]}}"},
}
METRICS = {"chosen": ["acc", "acc_norm"], "written": ["exact_match"]}


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """task(kind, **settings): a task over `WORDS` in a file; what `compare.metric` says of it."""

    def make(kind: str, **settings: Any) -> str:
        rows = [{"prompt": f"{a} and {b}", "choices": WORDS, "label": n} for a in WORDS for n, b in enumerate(WORDS)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
        own = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{prompt}}"}
        metrics = {"metric_list": [{"metric": name} for name in METRICS[kind]]}
        own |= {"target_delimiter": "", "generation_kwargs": {"max_gen_toks": 8, "until": ["\n"]}}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump({"task": f"words_{kind}", **own, **KINDS[kind], **metrics, **settings}))
        return f"lm_eval:{file}"

    return make


def test_without_lm_eval_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install lm-eval to use compare.metric lm_eval:...: pip install '.\[eval\]'"):
        require_harness()


def test_of_several_filters_the_first_counts() -> None:
    samples = [{"doc_id": n, "filter": name} for name in ("strict", "flexible") for n in range(3)]
    assert _first_filter(samples) == samples[:3]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"target": 1, "arguments": [["p", " a"], ["p", " b"]], "filtered_resps": [[-1.0, False], [-2.0, False]]}, ("b", "a")),
        ({"target": "b", "arguments": [["p", " a"], ["p", " b"]], "filtered_resps": [[-3.0, 0], [-2.0, 0]]}, ("b", "b")),
        ({"target": "42", "arguments": [["p", {"until": []}]], "filtered_resps": [" 43 "]}, ("42", "43")),
    ],
)
def test_the_right_answer_and_the_given_one_are_texts(sample: dict[str, Any], said: tuple[str, str]) -> None:
    assert _said(sample) == said


def test_lm_eval_chooses_what_we_choose(task: Callable[..., str], untied_base: str, make_adapter: Any, tmp_path: Path) -> None:
    """Its accuracy over options and ours are made apart, from the same weights. A base without a template, as its own answers
    to a template begin otherwise."""
    pytest.importorskip("lm_eval")
    adapter = Folder.at(make_adapter(tmp_path / "adapter", untied_base, std=0.3))
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    rows = [{"prompt": f"{a} and {b}", "completion": b, "choices": WORDS} for a in WORDS for b in WORDS]
    tokens = [{"sample_id": str(n), **tokenise(row, tokenizer, Reading(choices=True))} for n, row in enumerate(rows)]
    data = Folder.at(tmp_path / "data")
    data.write_table("test.parquet", pa.Table.from_pylist(tokens, schema=TEST))
    ours = answers_on_test(untied_base, "float32", data, adapter, "choices")
    theirs = answers_on_test(untied_base, "float32", data, adapter, task("chosen"))
    assert theirs.schema == ANSWERS
    for column in ("prompt", "reference", "answer", "score"):
        assert theirs[column].to_pylist() == ours[column].to_pylist(), column
    assert 0 < sum(ours["score"].to_pylist()) < len(rows)
    assert theirs["sample_id"].to_pylist() == [f"words_chosen/{n}" for n in range(len(rows))]


def test_what_is_written_to_a_task_goes_through_the_chat_template(task: Callable[..., str], tiny_base: str) -> None:
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    found = answer_task(model, AutoTokenizer.from_pretrained(tiny_base), task("written"))
    assert found["prompt"][0].as_py() == "<|im_start|>user\nfox and fox<|im_end|>\n<|im_start|>assistant\n"
    assert found["reference"].to_pylist() == WORDS * len(WORDS)
    assert set(found["score"].to_pylist()) == {0.0}


@pytest.mark.parametrize(("alike", "at_once"), [(True, harness.ROWS_AT_ONCE), (False, 1)])
def test_rows_that_would_be_answered_otherwise_in_batches_go_one_by_one(
    alike: bool, at_once: int, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    stub = SimpleNamespace(HFLM=lambda batch_size, **given: asked.append(batch_size))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=lambda *given, **settings: {"samples": {}}))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace(huggingface=stub))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", stub)
    monkeypatch.setattr(harness, "_load", lambda metric: {})
    monkeypatch.setattr(harness, "may_share_batches", lambda model: alike)
    answer_task(SimpleNamespace(), AutoTokenizer.from_pretrained(tiny_base), "lm_eval:any")
    assert asked == [at_once]


def test_a_task_that_cannot_be_had_is_refused(task: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    require_task(task("chosen"))
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(InputError, match="the task cannot be loaded") as refusal:
        require_task(f"lm_eval:{tmp_path}/broken.yaml")
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"the task cannot be loaded .*nowhere"):
        require_task(task("chosen", dataset_kwargs={"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}))
    with pytest.raises(InputError, match="the first metric of words_chosen is no mean over rows"):
        require_task(task("chosen", metric_list=[{"metric": "f1"}]))


def test_a_key_is_of_the_tasks_file(task: Callable[..., str]) -> None:
    pytest.importorskip("lm_eval")
    before = task_key(task("chosen"))
    assert task_key(task("chosen")) == before
    assert task_key(task("chosen", doc_to_text="{{prompt}}?")) != before
    assert task_key("lm_eval:arc_easy") != task_key("lm_eval:arc_challenge")
