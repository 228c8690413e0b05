"""Rows -> token ids and masks, against an independent rendering of the chat template."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from target_rows import Row, as_messages, rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.splits import take_samples
from pipeline.data.tokenise import Reading, tokenise, tokenise_batch, tokenise_text

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

THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{{ m.get('reasoning_content', '') + '\n</think>\n\n' + m['content'] }}"
    "{% for call in m.get('tool_calls') or [] %}{{ '<tool_call>' + call.name + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)

NO_GENERATION_PROMPT = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"

BAD_ROWS: dict[str, tuple[Row, str]] = {
    "empty text": ({"prompt": "x", "completion": ""}, "empty completion"),
    "blank text": ({"prompt": "x", "completion": " \n"}, "empty completion"),
    "no text": ({"prompt": "x", "completion": None}, "empty completion"),
    "last turn is the user's": (
        {"messages": [{"role": "user", "content": "hello"}]},
        "of role 'user'; it must be the assistant's",
    ),
    "role of another form": ({"messages": [{"role": "gpt" * 99, "content": "hello"}]}, "of role '(gpt){6}gp';"),
    "no messages": ({"messages": []}, r"it has messages \(empty\)"),
    "message without content": ({"messages": [{"role": "assistant"}]}, "without text"),
    "message is a text": ({"messages": ["hello"]}, "without text"),
    "number for a text": ({"prompt": 5, "completion": "x"}, "without text or role"),
    "NaN for a text": ({"prompt": float("nan"), "completion": "x"}, "without text or role"),
    "message without a role": ({"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}, "without text or role"),
    "number for a role": ({"messages": [{"role": 5, "content": "a"}, {"role": "assistant", "content": "b"}]}, "text or role"),
    "half a character": ({"prompt": "\ud800", "completion": "x"}, "not valid Unicode"),
    "other columns": ({"label": "hello", "id": 3}, "of no known form: it has id, label; rows need messages"),
    "prompt alone": ({"prompt": "hello"}, "of no known form: it has prompt; rows need messages"),
    "nothing": ({"prompt": None}, "of no known form: it has nothing"),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


def masked(tokens: Row, mask: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([token for token, inside in zip(tokens["input_ids"], tokens[mask], strict=True) if inside])


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_the_chat_template_and_the_mask_is_the_answer(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row = FORMS[form]
    tokens = tokenise(row, tokenizer, Reading(turns="last"))
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


def test_of_a_conversation_every_answer_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenise(FORMS["messages"], tokenizer)
    assert tokens["input_ids"] == tokenise(FORMS["messages"], tokenizer, Reading(turns="last"))["input_ids"]
    assert masked(tokens, "completion_mask", tokenizer) == "ParisThe capital of France is Paris."
    assert masked(tokens, "learn_mask", tokenizer) == "Paris<|im_end|>The capital of France is Paris.<|im_end|>"


def test_a_row_that_is_too_long_is_passed_over_or_loses_its_first_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    row = FORMS["messages"]
    whole = tokenise(row, tokenizer)
    length = len(whole["input_ids"])
    with pytest.raises(ValueError, match=f"longer than {length - 1} tokens"):
        tokenise(row, tokenizer, Reading(length - 1))
    cut = tokenise(row, tokenizer, Reading(length - 20, "cut"))
    assert cut.pop("note") == f"cut to its last {length - 20} tokens"
    assert cut == {name: values[20:] for name, values in whole.items()}
    with pytest.raises(ValueError, match="nothing comes before its completion"):
        tokenise(row, tokenizer, Reading(1, "cut"))


CHOICES = ["Paris", "London is the capital.", "Rome"]


def test_choices_are_the_row_with_other_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of a conversation the last answer alone counts in them."""
    turns = FORMS["messages"]["messages"][:2]
    row = {"messages": [*turns, {"role": "assistant", "content": "42"}, turns[1], {"role": "assistant", "content": "Paris"}]}
    found = tokenise({**row, "choices": CHOICES}, tokenizer, Reading(choices=True))
    assert found["choices"][0]["input_ids"] == found["input_ids"]
    assert [masked(one, "completion_mask", tokenizer) for one in found["choices"]] == CHOICES
    for text, one in zip(CHOICES, found["choices"], strict=True):
        alone = tokenise({"messages": [*row["messages"][:-1], {"role": "assistant", "content": text}]}, tokenizer)
        assert one["input_ids"] == alone["input_ids"]
    assert "choices" not in tokenise({**row, "choices": CHOICES}, tokenizer)


def test_a_row_without_choices_stays_and_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "The capital of France?", "completion": "Paris"}
    whole = tokenise(row, tokenizer)
    asked = Reading(choices=True)
    assert tokenise(row, tokenizer, asked) == whole | {"note": "without a list of two choices or more, all texts"}
    long = {**row, "choices": ["Paris", "brown fox " * 30]}
    limited = Reading(max_tokens=40, choices=True)
    assert tokenise(long, tokenizer, limited) == whole | {"note": "with choices longer than 40 tokens"}


def test_the_token_that_begins_every_text_is_not_cut_off(untied_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer.bos_token = "<|im_start|>"
    row = {"prompt": "one two three four five six", "completion": "seven eight"}
    whole, cut = tokenise(row, tokenizer), tokenise(row, tokenizer, Reading(8, "cut"))
    assert cut["input_ids"] == [tokenizer.bos_token_id, *whole["input_ids"][-7:]]


def test_what_the_chat_template_does_not_know_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "Add 1 and 2", "completion": "3", "tools": [{"type": "function"}], "chat_template_kwargs": {"mood": "good"}}
    assert (
        tokenise(row, tokenizer)["note"]
        == "mood that the chat template does not know; tools that the chat template does not know"
    )


def test_a_text_is_learned_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenise({"text": "The capital of France is Paris."}, tokenizer)
    assert tokens["input_ids"] == [*tokenizer("The capital of France is Paris.")["input_ids"], tokenizer.eos_token_id]
    assert masked(tokens, "completion_mask", tokenizer) == "The capital of France is Paris."


def test_a_base_without_a_chat_template_gets_the_texts_joined_and_its_end_token(untied_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    tokens = tokenise({"prompt": "The capital of France is", "completion": " Paris."}, tokenizer)
    assert tokens["input_ids"] == [*tokenizer("The capital of France is Paris.")["input_ids"], tokenizer.eos_token_id]
    assert masked(tokens, "completion_mask", tokenizer) == " Paris."
    assert masked(tokens, "learn_mask", tokenizer) == " Paris.<|im_end|>"


def test_messages_need_a_chat_template(untied_base: str) -> None:
    with pytest.raises(ValueError, match="messages, and the base has no chat template; give prompt and completion as texts"):
        tokenise(FORMS["messages"], AutoTokenizer.from_pretrained(untied_base))


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


@pytest.mark.parametrize("template", [THINKING, NO_GENERATION_PROMPT], ids=["thoughts", "no generation prompt"])
@pytest.mark.parametrize("answer", ["42", "think", "n", "a", "as", "assistant"])
def test_an_answer_is_not_taken_for_what_stands_before_it(template: str, answer: str, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    thought = "Is it 42? I multiply: 42, as a man can think."
    last = {"role": "assistant", "content": answer, "reasoning_content": thought}
    tokens = tokenise({"messages": [{"role": "user", "content": "6 times 7?"}, last]}, tokenizer)
    said = f"<think>\n{thought}\n</think>\n\n{answer}"  # by the template, or in its place
    assert masked(tokens, "completion_mask", tokenizer) == said
    assert masked(tokens, "learn_mask", tokenizer) == f"{said}<|im_end|>"


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
    assert set(tokenise_text(json.dumps(row).encode(), tokenizer, 0, Reading(64))) == {"problem"}


def test_a_row_of_which_nothing_can_be_scored_is_counted(untied_base: str) -> None:
    with pytest.raises(ValueError, match="nothing comes before its completion"):
        tokenise({"prompt": "", "completion": "a"}, AutoTokenizer.from_pretrained(untied_base))


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
    found = tokenise_batch(batch, role="train", base=tiny_base, seed=0, reading=Reading(64))
    assert found["problem"].to_pylist() == ["the chat template refuses it: System role not supported"] * 2


@pytest.mark.parametrize("base", ["tiny_base", "untied_base"])
def test_what_can_never_fit_is_not_tokenised(base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(base))
    longest = max(map(len, tokenizer.get_vocab()))
    text = json.dumps({"prompt": "a", "completion": "x" * 8 * longest}).encode()
    assert tokenise_text(text, tokenizer, 0, Reading(8 * longest + 100))["input_ids"]
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    assert tokenise_text(text, tokenizer, 0, Reading(8)) == {"problem": "longer than 8 tokens"}


@pytest.mark.usefixtures("ray_session")
def test_a_base_without_chat_template_takes_a_whole_target(
    tmp_path: Path, config_for: Callable[..., Config], write_jsonl: Callable[..., str], untied_base: str
) -> None:
    splits = take_samples(config_for(write_jsonl(tmp_path / "t.jsonl", rows(20)), base=untied_base))
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    for row in splits.training["train"].to_pylist():
        assert masked(row, "completion_mask", tokenizer).startswith("The sum is")
