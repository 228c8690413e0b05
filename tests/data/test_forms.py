"""Rows as trainers and the Hub's data sets have them: all forms of one conversation say the same."""

import json
from typing import Any

import pytest

from pipeline.data.forms import RowError, choices, conversation

ASKED, SAID = "Add 1 and 2.", "It is 3."
PAIR = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": PAIR},
    "messages as JSON text": {"messages": json.dumps(PAIR)},
    "fields without a value": {"messages": [{**turn, "tool_calls": None, "name": None} for turn in PAIR]},
    "content in parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in PAIR]},
    "conversations": {"conversations": PAIR},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT's other names": {"conversation": [{"from": "user", "value": ASKED}, {"from": "chatgpt", "value": SAID}]},
    "roles in capitals": {"conversations": [{"from": "Human", "value": ASKED}, {"from": "GPT", "value": SAID}]},
    "both spellings": {"conversations": [{**a, **b} for a, b in zip(PAIR, SHAREGPT, strict=True)]},
    "texts": {"prompt": ASKED, "completion": SAID},
    "message lists": {"prompt": PAIR[:1], "completion": PAIR[1:]},
    "message lists as JSON text": {"prompt": json.dumps(PAIR[:1]), "completion": json.dumps(PAIR[1:])},
    "a chosen text": {"prompt": ASKED, "chosen": SAID, "rejected": "4"},
    "a chosen message": {"prompt": ASKED, "chosen": PAIR[1:], "rejected": PAIR[1:]},
    "a chosen conversation": {"prompt": ASKED, "chosen": PAIR, "rejected": PAIR},
    "chosen alone": {"chosen": PAIR, "rejected": PAIR},
    "Alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "Alpaca without input": {"instruction": ASKED, "output": SAID},
    "preferences about ShareGPT's turns": {
        "conversations": SHAREGPT[:1],
        "chosen": {"from": "gpt", "value": SAID},
        "rejected": {"from": "gpt", "value": "x"},
    },
    "preferences about messages": {"messages": PAIR[:1], "chosen": PAIR[1], "rejected": PAIR[0]},
    "preferences about an instruction": {"instruction": ASKED, "input": "", "chosen": SAID, "rejected": "x"},
    "plain roles in capitals": {"messages": [{"role": "User", "content": ASKED}, {"role": "ASSISTANT", "content": SAID}]},
    "no messages beside another form": {"messages": [], "conversations": [], "prompt": ASKED, "completion": SAID},
    "a question that nobody answered": {"messages": [*PAIR, {"role": "user", "content": "And?"}]},
    "a call that nobody followed": {
        "messages": [*PAIR, {"role": "user", "content": "And?"}, {"role": "assistant", "tool_calls": [{"type": "function"}]}]
    },
    "a form that is empty beside another": {"messages": None, "text": None, "instruction": ASKED, "input": None, "output": SAID},
    "an answer that is wanted": {"prompt": ASKED, "completion": SAID, "label": True},
    "a label that is a class": {"prompt": ASKED, "completion": SAID, "label": 0},
    "a system prompt that is empty": {"conversations": SHAREGPT, "system": "", "tools": ""},
}


@pytest.mark.parametrize("form", SAME)
def test_all_forms_say_the_same(form: str) -> None:
    found = conversation(SAME[form])
    assert found.messages == PAIR
    assert found.options == {}
    assert not found.bare


def test_what_goes_with_a_conversation_is_kept() -> None:
    given = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    for row in (given, {name: json.dumps(value) for name, value in given.items()}):
        found = conversation({"conversations": SHAREGPT, "system": "Be short.", **row})
        assert found.messages == [{"role": "system", "content": "Be short."}, *PAIR]
        assert found.options == {"tools": [TOOL], "enable_thinking": False}
    assert conversation({"messages": PAIR, "system_prompt": "Be short."}).messages[0]["content"] == "Be short."
    own = [{"role": "system", "content": "Be long."}, *PAIR]
    assert conversation({"messages": own, "system": "Be short."}).messages == own


def test_an_input_follows_its_instruction_and_a_history_comes_before_it() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "history": [["Hello", "Hi"]]}
    assert [turn["content"] for turn in conversation(row).messages] == ["Hello", "Hi", "Translate.\nHund", "dog"]


def test_calls_of_tools_need_no_text() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    native = [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}, PAIR[1]]
    factory = [
        SHAREGPT[0],
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        SHAREGPT[1],
    ]
    expected = [PAIR[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}, PAIR[1]]
    assert conversation({"messages": native}).messages == expected
    assert conversation({"conversations": factory}).messages == expected
    swift = [PAIR[0], {"role": "tool_call", "content": factory[1]["value"]}, {"role": "tool_response", "content": "3"}, PAIR[1]]
    assert conversation({"messages": swift}).messages == expected
    twice = [factory[0], {"from": "function_call", "value": f"[{factory[1]['value']}, {factory[1]['value']}]"}, *factory[2:]]
    assert conversation({"conversations": twice}).messages == [PAIR[0], {**expected[1], "tool_calls": [call] * 2}, *expected[2:]]


@pytest.mark.parametrize("text", ["[1, 2]", '{"role": "user"}', '[{"a": 1}]', "[not JSON", "[]", "{}"])
def test_an_answer_that_is_json_is_a_text(text: str) -> None:
    assert conversation({"prompt": text, "completion": text}).messages[1]["content"] == text


def test_columns_have_the_names_that_the_config_says() -> None:
    row = {"question": ASKED, "answer": SAID, "prompt": "another", "text": "Add 1 and 2. It is 3."}
    found = conversation(row, {"prompt": "question", "completion": "answer"})
    assert found.messages == PAIR
    assert found.texts


def test_a_text_is_bare() -> None:
    found = conversation({"text": "Once upon a time"})
    assert found.bare
    assert found.messages[-1]["content"] == "Once upon a time"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, r"it has answer, question; rows need .* \(target.columns names others\)"),
        ({"prompt": "a"}, "it has prompt; rows need"),
        ({"prompt": "a", "completion": "b", "label": False}, "label: false, .* its answer is not wanted"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "its answer is not wanted"),
        ({"messages": PAIR, "label": False}, "its answer is not wanted"),
        ({"conversations": SHAREGPT, "kto_tag": False}, "kto_tag: false"),
        ({"instruction": "a", "output": "b", "label": False}, "its answer is not wanted"),
        ({"chosen": "b", "rejected": "c"}, "a chosen answer without a prompt"),
        ({"messages": "hello"}, "messages that are no list"),
        ({"chosen": ["a", "b"], "rejected": ["a", "c"]}, "a message without text or role"),
        ({"prompt": ["a"], "chosen": PAIR, "rejected": PAIR[:1], "label": False}, "its answer is not wanted"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, PAIR[1]]}, r"parts that are no text \(image\)"),
        ({"messages": PAIR, "chat_template_kwargs": "loud"}, "chat_template_kwargs that are no object"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "add"}]}, "a call of a tool that is not JSON"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "[1]"}]}, "a call of a tool that is not JSON"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "a history that is no list of pairs"),
        ({"instruction": "a", "output": 5}, "without text or role"),
    ],
)
def test_what_cannot_be_read_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": SAID, "choices": ["It is 2.", SAID]},
        {"messages": PAIR, "choices": json.dumps(["It is 2.", SAID])},
        {"prompt": ASKED, "completion": SAID, "options": [" It is 2.", f"{SAID} "]},
    ],
)
def test_each_choice_takes_the_place_of_the_answer(row: dict[str, Any]) -> None:
    columns = {"choices": "options"} if "options" in row else {}
    found = choices(row, conversation(row, columns), columns)
    assert [one.messages[-1]["content"] for one in found] == ["It is 2.", SAID]
    assert all(one.messages[:-1] == PAIR[:1] for one in found)


def test_a_choice_has_the_blanks_of_the_answer_around_it() -> None:
    """A base without a chat template learns answers that begin with a blank."""
    row = {"prompt": ASKED, "completion": f" {SAID}\n", "choices": [SAID, "It is 2."]}
    assert [one.messages[-1]["content"] for one in choices(row, conversation(row))] == [f" {SAID}\n", " It is 2.\n"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "without a list of two choices"),
        (SAID, "without a list of two choices"),
        ([SAID], "without a list of two choices"),
        ([SAID, 2], "without a list of two choices"),
        ([SAID, " "], "without a list of two choices"),
        (["It is 2.", "It is 4."], "an answer that is none of its choices"),
    ],
)
def test_choices_that_are_none_are_told(given: Any, message: str) -> None:
    row = {"prompt": ASKED, "completion": SAID, "choices": given}
    with pytest.raises(RowError, match=message):
        choices(row, conversation(row))


def test_a_text_may_have_a_label_of_any_kind() -> None:
    assert conversation({"text": "x", "label": False}).bare


def test_a_system_message_goes_with_a_whole_conversation_that_lacks_it() -> None:
    system = {"role": "system", "content": "Be short."}
    found = conversation({"prompt": [system, PAIR[0]], "chosen": PAIR, "rejected": PAIR})
    assert found.messages == [system, *PAIR]
    assert conversation({"prompt": [system, PAIR[0]], "chosen": [system, *PAIR], "rejected": PAIR}).messages == [system, *PAIR]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_a_call_are_an_object(arguments: Any) -> None:
    """OpenAI has them as JSON text; a template that writes JSON of them would show a quoted text."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = conversation({"messages": [PAIR[0], called, {"role": "tool", "content": "3"}, PAIR[1]]})
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
