"""Target data -> samples: masks against an independent rendering, the draw, the splits and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.core.tables import SAMPLES
from pipeline.data import splits
from pipeline.data.splits import Splits, take_samples, target_paths
from pipeline.data.tokenise import tokenise, tokenise_batch, tokenise_text

Row = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


def rows(n: int, start: int = 0) -> list[Row]:
    return [{"prompt": f"What is {i} plus {i}?", "completion": f"The sum is {2 * i}."} for i in range(start, start + n)]


def as_messages(row: Row) -> Row:
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}


def ids_of(splits: Splits, split: str) -> list[str]:
    return splits.training[split]["sample_id"].to_pylist()


def masked(tokens: Row, mask: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([token for token, inside in zip(tokens["input_ids"], tokens[mask], strict=True) if inside])


FORMS: dict[str, Row] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris"},
            {"role": "user", "content": "And again?"},
            {"role": "assistant", "content": "The capital of France is Paris."},
        ]
    },
    "texts": {"prompt": "Is this review positive?", "completion": "Yes, it is.\nVery much so."},
    "message lists": {
        "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "7 times 6?"}],
        "completion": [{"role": "assistant", "content": "42"}],
    },
    "other columns": {"prompt": "café?", "completion": "naïve 日本 🎉", "label": 3, "messages": None},
    "answer that repeats the prompt": {"prompt": "Paris", "completion": "Paris"},
    "answer that is a word of the template": {"prompt": "Who are you?", "completion": "assistant"},
    "answer that ends in blanks": {"prompt": "Say x", "completion": " x \n"},
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_the_chat_template_and_the_mask_is_the_answer(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row = FORMS[form]
    tokens = tokenise(row, tokenizer)
    turns = row.get("messages") or as_messages(row)["messages"]
    if isinstance(row.get("prompt"), list):
        turns = [*row["prompt"], *row["completion"]]
    answer = turns[-1]["content"]
    # Independently: ids of the prompt with its generation prompt, then of the answer, then of the end of the turn.
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    length = whole.index(tokenizer.eos_token_id, len(prompt)) + 1
    assert tokens["input_ids"] == whole[:length]
    assert tokens["completion_mask"] == [False] * len(prompt) + [True] * (length - len(prompt) - 1) + [False]
    assert tokens["learn_mask"] == [False] * len(prompt) + [True] * (length - len(prompt))
    assert masked(tokens, "completion_mask", tokenizer) == answer
    assert masked(tokens, "learn_mask", tokenizer) == answer + "<|im_end|>"


def test_a_base_without_a_chat_template_gets_the_texts_joined_and_its_end_token(untied_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    tokens = tokenise({"prompt": "The capital of France is", "completion": " Paris."}, tokenizer)
    assert tokens["input_ids"] == [*tokenizer("The capital of France is Paris.")["input_ids"], tokenizer.eos_token_id]
    assert masked(tokens, "completion_mask", tokenizer) == " Paris."
    assert masked(tokens, "learn_mask", tokenizer) == " Paris.<|im_end|>"


def test_a_template_that_strips_the_answer_and_thinks_before_it(tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokens = tokenise({"prompt": "Add 1 and 2", "completion": "  It is 3.\n"}, tokenizer)
    assert masked(tokens, "completion_mask", tokenizer) == "It is 3."
    assert masked(tokens, "learn_mask", tokenizer) == "It is 3.<|im_end|>"


THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{{ m.get('reasoning_content', '') + '\n</think>\n\n' + m['content'] }}"
    "{% for call in m.get('tool_calls') or [] %}{{ '<tool_call>' + call.name + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize("template", [THINKING, NO_GENERATION_PROMPT], ids=["thoughts", "no generation prompt"])
@pytest.mark.parametrize("answer", ["42", "think", "n", "a", "as", "assistant"])
def test_an_answer_is_not_taken_for_what_stands_before_it(template: str, answer: str, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    last = {"role": "assistant", "content": answer, "reasoning_content": "Is it 42? I multiply: 42, as a man can think."}
    tokens = tokenise({"messages": [{"role": "user", "content": "6 times 7?"}, last]}, tokenizer)
    assert masked(tokens, "completion_mask", tokenizer) == answer
    assert masked(tokens, "learn_mask", tokenizer) == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"content": "I call it.", "tool_calls": [{"name": "f"}]}, "its answer calls tools"),
        ({"content": "y", "reasoning_content": 5}, r"the chat template fails \(TypeError\)"),
        ({"content": "y", "reasoning_content": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_row_whose_other_fields_are_odd_is_counted(last: Row, reason: str, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = THINKING
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **last}]}
    with pytest.raises(ValueError, match=reason):
        tokenise(row, tokenizer)
    assert set(tokenise_text(json.dumps(row).encode(), tokenizer, 0, 64)) == {"problem"}


def test_a_row_of_which_nothing_can_be_scored_is_counted(untied_base: str) -> None:
    with pytest.raises(ValueError, match="nothing comes before its completion"):
        tokenise({"prompt": "", "completion": "a"}, AutoTokenizer.from_pretrained(untied_base))


def test_many_reasons_are_told_in_few(tmp_path: Path, config_for: Callable[..., Config], ray_session: None) -> None:
    odd = [{"messages": [{"role": "user", "content": "?"}, {"role": f"r{n}", "content": "x"}]} for n in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows(30), *odd])))
    counts = take_samples(config_for(tmp_path / "t.jsonl")).counts["train"]
    assert counts["used"] == 30
    assert counts["other reasons"] == 300 - splits.MAX_PROBLEMS


BAD_ROWS: dict[str, tuple[Row, str]] = {
    "empty text": ({"prompt": "x", "completion": ""}, "empty completion"),
    "blank text": ({"prompt": "x", "completion": " \n"}, "empty completion"),
    "no text": ({"prompt": "x", "completion": None}, "empty completion"),
    "last turn is the user's": (
        {"messages": [{"role": "user", "content": "hello"}]},
        "of role 'user'; it must be the assistant's",
    ),
    "role of another form": ({"messages": [{"role": "gpt" * 99, "content": "hello"}]}, "of role '(gpt){6}gp';"),
    "no messages": ({"messages": []}, "without text"),
    "message without content": ({"messages": [{"role": "assistant"}]}, "without text"),
    "message is a text": ({"messages": ["hello"]}, "without text"),
    "number for a text": ({"prompt": 5, "completion": "x"}, "without text or role"),
    "NaN for a text": ({"prompt": float("nan"), "completion": "x"}, "without text or role"),
    "message without a role": ({"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}, "without text or role"),
    "number for a role": ({"messages": [{"role": 5, "content": "a"}, {"role": "assistant", "content": "b"}]}, "text or role"),
    "half a character": ({"prompt": "\ud800", "completion": "x"}, "not valid Unicode"),
    "other columns": ({"text": "hello"}, "neither messages nor prompt and completion"),
    "prompt alone": ({"prompt": "hello"}, "neither messages nor prompt and completion"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_used_says_why(case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row, reason = BAD_ROWS[case]
    with pytest.raises(ValueError, match=reason):
        tokenise(row, tokenizer)


def test_an_answer_without_a_question_is_counted_not_fatal(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="an answer without a question"):
        tokenise({"messages": [{"role": "assistant", "content": "Hello."}]}, tokenizer)


def test_a_row_that_the_chat_template_refuses_is_counted_not_fatal(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    monkeypatch.setattr("pipeline.data.tokenise.load_tokenizer", lambda base: tokenizer)
    batch = pa.table({"row": [json.dumps(row) for row in rows(2)]})
    found = tokenise_batch(batch, role="train", base=tiny_base, seed=0, max_tokens=64)
    assert found["problem"].to_pylist() == ["the chat template refuses it: System role not supported"] * 2


@pytest.mark.parametrize("base", ["tiny_base", "untied_base"])
def test_what_can_never_fit_is_not_tokenised(base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(base))
    longest = max(map(len, tokenizer.get_vocab()))
    text = json.dumps({"prompt": "a", "completion": "x" * 8 * longest}).encode()
    assert tokenise_text(text, tokenizer, 0, 8 * longest + 100)["input_ids"]
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    assert tokenise_text(text, tokenizer, 0, 8) == {"problem": "longer than 8 tokens"}


def shown(splits: Splits) -> list[Row]:
    """Everything that a run draws from."""
    return [splits.search.to_pylist(), *(splits.training[role].to_pylist() for role in ("train", "validation", "test"))]


def write_as(kind: str, folder: Path, data: list[Row]) -> Path:
    """`data` in one of the file formats that a target may have."""
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(data), folder / "train.parquet", row_group_size=7)
        return folder / "train.parquet"
    if kind == "parquet folder":
        for number in range(3):
            pq.write_table(pa.Table.from_pylist(data[number::3]), folder / f"{number}.parquet")
        return folder
    if kind == "Dataset":
        Dataset.from_list(data).save_to_disk(folder / "d")
        return folder / "d"
    if kind == "DatasetDict":
        DatasetDict({"train": Dataset.from_list(data), "other": Dataset.from_list(rows(2))}).save_to_disk(folder / "d")
        return folder / "d"
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    return folder / "train.jsonl"


@pytest.mark.usefixtures("ray_session")
def test_the_draw_depends_on_content_and_seed_alone(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    data = rows(40)
    expected = shown(take_samples(config_for(write_as("jsonl", tmp_path / "a", data))))
    messages = [as_messages(row) for row in data]
    others = {
        "jsonl": data[::-1],
        "parquet": messages,
        "parquet folder": data,
        "Dataset": data[20:] + data[:20],
        "DatasetDict": messages,
    }
    for kind, content in others.items():
        found = take_samples(config_for(write_as(kind, tmp_path / kind.replace(" ", "-"), content)))
        assert shown(found) == expected, kind
    other_seed = take_samples(config_for(tmp_path / "a" / "train.jsonl", seed=1))
    assert shown(other_seed) != expected


@pytest.mark.usefixtures("ray_session")
def test_splits_are_disjoint_and_complete(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(40)), samples=8))
    train, validation, test = (ids_of(splits, role) for role in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (32, 4, 4)
    assert len({*train, *validation, *test}) == 40
    drawn = splits.search["sample_id"].to_pylist()
    assert set(drawn) <= set(train)
    assert splits.search["split"].to_pylist() == ["search"] * 6 + ["holdout"] * 2
    assert len(set(drawn)) == 8
    assert all(table.schema.names == SAMPLES.names for table in [splits.search, *splits.training.values()])
    assert {role: set(table["split"].to_pylist()) for role, table in splits.training.items()} == {
        "train": {"train"},
        "validation": {"validation"},
        "test": {"test"},
    }


@pytest.mark.usefixtures("ray_session")
def test_given_splits_are_read_and_limited(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    paths = {
        role: write_jsonl(tmp_path / f"{role}.jsonl", rows(10, start)) for role, start in [("validation", 100), ("test", 200)]
    }
    train = write_jsonl(tmp_path / "train.jsonl", rows(20))
    splits = take_samples(config_for(train, validation_rows=3, test_rows=4, **paths))
    assert {role: len(table) for role, table in splits.training.items()} == {"train": 20, "validation": 3, "test": 4}
    assert splits.counts == {
        "train": {"used": 20, "repeated (trained on, sampled once)": 0},
        "validation": {"used": 10},
        "test": {"used": 10},
    }


@pytest.mark.usefixtures("ray_session")
def test_repeated_rows_are_sampled_once_and_stay_on_one_side_of_a_split(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    data = [row for row in rows(12) for _ in range(5)]
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", data), samples=64))
    drawn = splits.search["sample_id"].to_pylist()
    train, validation, test = (set(ids_of(splits, role)) for role in ("train", "validation", "test"))
    assert sorted(drawn) == sorted(train)
    assert splits.counts["train"]["repeated (trained on, sampled once)"] == len(ids_of(splits, "train")) - len(train)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.usefixtures("ray_session")
def test_rows_passed_over_are_counted(tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]) -> None:
    bad = [{"prompt": "x", "completion": "word " * 200}, {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": " "}]
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", bad + rows(20)), max_tokens=64))
    assert splits.counts["train"] == {
        "used": 20,
        "longer than 64 tokens": 1,
        "empty completion": 2,
        "repeated (trained on, sampled once)": 0,
    }


@pytest.mark.usefixtures("ray_session")
def test_rows_that_the_base_cannot_read_at_once_are_passed_over(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    """The tiny base reads 512 tokens."""
    path = write_jsonl(tmp_path / "t.jsonl", [*rows(20), {"prompt": "fox " * 600, "completion": "x"}])
    assert take_samples(config_for(path)).counts["train"]["longer than 511 tokens"] == 1


@pytest.mark.usefixtures("ray_session")
def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    data = [{"prompt": f"a\u2028b {i}", "completion": "c\x85d\u2029e"} for i in range(20)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in data), encoding="utf-8")
    assert take_samples(config_for(path)).counts["train"]["used"] == 20


@pytest.mark.usefixtures("ray_session")
def test_a_base_without_chat_template_takes_a_whole_target(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str], untied_base: str
) -> None:
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(20)), base=untied_base))
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    for row in splits.training["train"].to_pylist():
        assert masked(row, "completion_mask", tokenizer).startswith("The sum is")


def shared(folder: Path, sizes: dict[str, range]) -> dict[str, str]:
    """A file for each split of a target, with those of all the rows there are."""
    for role, places in sizes.items():
        (folder / f"{role}.jsonl").write_text("\n".join(json.dumps(row) for place in places for row in rows(1, place)))
    return {role: str(folder / f"{role}.jsonl") for role in sizes}


@pytest.mark.usefixtures("ray_session")
def test_what_is_in_several_given_splits_stays_in_one(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    sizes = {"train": range(40), "validation": range(36, 50), "test": range(30, 38)}
    splits = take_samples(config_for(**shared(tmp_path, sizes)))
    train, validation, test = (set(ids_of(splits, role)) for role in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (30, 12, 8)
    assert len(train | validation | test) == 50
    assert splits.counts == {
        "train": {"used": 30, "also in test or validation": 10, "repeated (trained on, sampled once)": 0},
        "validation": {"used": 12, "also in test": 2},
        "test": {"used": 8},
    }
    (tmp_path / "other").mkdir()
    other_order = take_samples(config_for(**shared(tmp_path / "other", {role: places[::-1] for role, places in sizes.items()})))
    assert shown(other_order) == shown(splits)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": range(20), "test": range(20)[::-1]}, "train.jsonl: 20 of 20 usable .* in .*/test.jsonl .target.test.; give"),
        (
            {"train": range(20), "validation": range(9, 40)},
            "11 of 20 .*target.train. .*/validation.jsonl .target.validation.; give",
        ),
        (
            {"train": range(20), "validation": range(30, 34), "test": range(30, 40)},
            "/validation.jsonl: 4 of 4 .*/test.jsonl .target.test.; give each split rows of its own",
        ),
    ],
)
def test_splits_of_hardly_any_rows_of_their_own_are_refused(
    sizes: dict[str, range], message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    with pytest.raises(InputError, match=message):
        take_samples(config_for(**shared(tmp_path, sizes)))


@pytest.mark.usefixtures("ray_session")
def test_splits_of_one_folder_that_hold_the_same_rows_are_refused(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    path = str(tmp_path / "d")
    DatasetDict({role: Dataset.from_list(rows(20)) for role in ("train", "test")}).save_to_disk(path)
    with pytest.raises(InputError, match="20 of 20 usable rows"):
        take_samples(config_for(path, test=path))


def fault(kind: str, folder: Path) -> str:
    """A target with something wrong; its path."""
    path = folder / "t.jsonl"
    good = [json.dumps(row) for row in rows(20)]
    texts = {
        "malformed line": "\n".join([*good[:3], '{"prompt": ', *good[3:]]),
        "list for an object": "\n".join([*good, "[1, 2]"]),
        "endless nesting": "\n".join([*good, "[" * 100_000]),
        "empty": "",
        "only blank lines": "\n\n\n",
        "unusable": '{"text": "a"}\n{"prompt": "a", "completion": ""}\n',
        "too few to split": "\n".join(good[:2]),
        "too few to search": "\n".join(good[:3]),
    }
    if kind in texts:
        path.write_text(texts[kind], encoding="utf-8")
    elif kind == "UTF-16":
        path.write_text("\n".join(good), encoding="utf-16")
    elif kind == "folder with a malformed line":
        (path := folder / "d.jsonl").mkdir()
        for name, lines in (("_skipped", "{"), ("a.jsonl", good[0]), ("b.jsonl", "\n{")):
            (path / name).write_text(lines)
    elif kind == "one row many times":
        path.write_text("\n".join(good[:1] * 50))
    elif kind == "other encoding":
        path.write_bytes('{"prompt": "café", "completion": "x"}\n'.encode("latin-1") * 3)
    elif kind == "not a Parquet file":
        (path := folder / "t.parquet").write_text("no Parquet at all")
    elif kind == "empty Parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path := folder / "t.parquet")
    elif kind == "a name that is too long":
        path = folder / ("x" * 300 + ".jsonl")
    elif kind == "other suffix":
        (path := folder / "t.csv").write_text("prompt,completion\na,b\n")
    elif kind == "empty folder":
        (path := folder / "empty").mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder of datasets without its data":
        Dataset.from_list(rows(5)).save_to_disk(path := folder / "d")
        next(path.glob("*.arrow")).write_bytes(b"x")
    elif kind == "split that is not there":
        DatasetDict({"other": Dataset.from_list(rows(5))}).save_to_disk(path := folder / "d")
    else:
        path = folder / "missing.jsonl"
    return str(path)


def test_the_same_data_is_not_taken_for_two_splits(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", rows(20))
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(InputError, match="the same data for two splits"):
        target_paths(config_for(path, test=str(tmp_path / "link.jsonl")))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("malformed line", "t.jsonl: line 4 is malformed JSON"),
        ("list for an object", "t.jsonl: line 21 is not a JSON object"),
        ("empty", "t.jsonl: the data set is empty"),
        ("only blank lines", "t.jsonl: the data set is empty"),
        ("unusable", "t.jsonl: no row can be used .*1 x neither messages nor prompt and completion"),
        ("too few to split", "too few to split"),
        ("too few to search", "too few to search with"),
        ("other encoding", "t.jsonl: line 1 is malformed JSON"),
        ("UTF-16", "t.jsonl: line 1 holds zero bytes, as UTF-16 does; .* in UTF-8"),
        ("folder with a malformed line", "d.jsonl/b.jsonl: line 2 is malformed JSON"),
        ("one row many times", "1 distinct usable rows are too few to split"),
        ("not a Parquet file", "t.parquet"),
        ("empty Parquet", "t.parquet: the data set is empty"),
        ("other suffix", "t.csv: target.train must be"),
        ("empty folder", "empty: the data set is empty, or no file"),
        ("endless nesting", "t.jsonl: line 21 is malformed JSON"),
        ("named pipe", "t.jsonl: the data set is empty, or no file"),
        ("folder of datasets without its data", "d: target.train is no folder that `datasets` saved whole"),
        ("split that is not there", "no split 'train'"),
        ("a name that is too long", "cannot be looked at .target.train; .*File name too long"),
        ("missing", "missing.jsonl: no such file or folder .target.train"),
    ],
)
def test_a_target_that_cannot_be_used_is_an_input_error(
    kind: str, message: str, tmp_path: Path, config_for: Callable[..., Config]
) -> None:
    with pytest.raises(InputError, match=message):
        take_samples(config_for(fault(kind, tmp_path)))


@pytest.mark.usefixtures("ray_session")
def test_an_unknown_base_is_an_input_error(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(InputError, match="no such folder"):
        take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(20)), base="/no/such/base"))
