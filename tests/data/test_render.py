"""Where the answers are in what chat templates of several kinds make of a conversation."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.data import render as render_module
from pipeline.data.forms import conversation
from pipeline.data.render import CLOCK, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LAST_THOUGHTS = """\
{%- if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
    {%- set thought = m.reasoning_content or '' %}{%- set said = m.content %}
    {%- if not thought and '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said.lstrip('\n') }}
    {%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"""
"""Shows thoughts of the last turn alone, from a field or from the text, and an empty thought where there is none."""

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML

TRIMMED = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '[end]' }}{% endfor %}"

THOUGHT, ANSWER = "I add them.", "It is 3."
INLINE = [f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", f"<think>{THOUGHT}</think>\n{ANSWER}"]


@pytest.fixture
def answers(tiny_base: str) -> Callable[..., list[str]]:
    """The parts of a rendered row that are its answers."""

    def find(template: str | None, row: dict[str, Any], **asked: Any) -> list[str]:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.chat_template = template
        found = render(conversation(row), tokenizer, **asked)
        return [found.text[start:end] for start, end in found.answers]

    return find


def chat(*turns: Any) -> dict[str, Any]:
    """Messages of user and assistant in turns; an answer may be a whole message."""
    roles = ("user", "assistant")
    return {"messages": [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]}


def thought(field: str = "reasoning_content") -> dict[str, Any]:
    return {"role": "assistant", "content": ANSWER, field: THOUGHT}


@pytest.mark.parametrize("template", [CHATML, LAST_THOUGHTS, DATED, TRIMMED])
def test_every_answer_or_the_last_one(template: str, answers: Callable[..., list[str]]) -> None:
    row = chat("a?", "a", "a?", " b\n", "a?", "a")
    middle = "b" if template in (TRIMMED,) else " b\n"
    assert answers(template, row) == ["a", middle, "a"]
    assert answers(template, row, turns="last") == ["a"]


@pytest.mark.parametrize("said", [*INLINE, thought(), thought("thinking"), thought("reasoning")])
def test_thoughts_count_with_their_answer_wherever_the_row_has_them(said: Any, answers: Callable[..., list[str]]) -> None:
    assert answers(LAST_THOUGHTS, chat("1 and 2?", said)) == [INLINE[0]]
    assert answers(CHATML, chat("1 and 2?", said)) == [said if isinstance(said, str) else INLINE[0]]


def test_of_thoughts_that_the_template_leaves_out_the_answer_counts(answers: Callable[..., list[str]]) -> None:
    assert answers(LAST_THOUGHTS, chat("?", INLINE[1], "?", thought())) == [ANSWER, INLINE[0]]
    assert answers(LAST_THOUGHTS, chat("?", thought(), "?", ANSWER)) == [ANSWER, ANSWER]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"loss": False}, {"trainable": 0}, {"training": "false"}])
def test_a_turn_that_is_not_to_be_learned_is_context(mark: dict[str, Any], answers: Callable[..., list[str]]) -> None:
    context = {"role": "assistant", "content": "a", **mark}
    learned = {"role": "assistant", "content": "b", "train": True, "weight": 1}
    for template in (CHATML, LAST_THOUGHTS):
        assert answers(template, chat("?", context, "?", learned)) == ["b"]
        assert answers(template, chat("?", learned, "?", context)) == ["b"]
        assert answers(template, chat("?", learned, "?", context), turns="last") == ["b"]
        with pytest.raises(ValueError, match="none of its answers is to be learned"):
            answers(template, chat("?", context))


KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and loop.first) %}"
    "{{ '[' + m.role + ']' + m.content + '[end]' }}{% elif m.role == 'tool' %}{{ '[tool]' + m.content | tojson + '[end]' }}"
    "{% endif %}{% endfor %}"
)
"""Passes over what is of another role, as those of Qwen do."""


@pytest.mark.parametrize(
    ("role", "said", "left_out"),
    [
        ("developer", "Be brief.", ["a message of role 'developer'"]),
        ("critic", "It is 3.", ["a message of role 'critic'"]),  # which is also said elsewhere
        ("system", "Be brief.", ["a message of role 'system'"]),
        ("tool", '{"sum": "3"}', []),
        ("user", "Go on.", []),
    ],
)
def test_messages_that_the_template_leaves_out_are_told(role: str, said: str, left_out: list[str], tiny_base: str) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_base)
    row = {"messages": [*chat("1 and 2?")["messages"], {"role": role, "content": said}, {"role": "assistant", "content": ANSWER}]}
    for template, expected in ((KNOWN_ROLES, left_out), (CHATML, [])):
        tokenizer.chat_template = template
        found = render(conversation(row), tokenizer)
        assert found.left_out == expected
        assert [found.text[start:end] for start, end in found.answers] == [ANSWER]


THOUGHTLESS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
"""Leaves out all thoughts, as DeepSeek-R1's template does."""


@pytest.mark.parametrize(
    ("template", "left_out"), [(THOUGHTLESS, [render_module.LAST_THOUGHTS]), (CHATML, []), (LAST_THOUGHTS, [])]
)
@pytest.mark.parametrize("said", [*INLINE, thought()])
def test_thoughts_that_are_lost_before_the_last_answer_are_told(
    template: str, left_out: list[str], said: Any, tiny_base: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    assert render(conversation(chat("?", said)), tokenizer).left_out == left_out
    assert render(conversation(chat("?", ANSWER)), tokenizer).left_out == []


def test_an_empty_thought_is_none(answers: Callable[..., list[str]]) -> None:
    empty = {"role": "assistant", "content": ANSWER, "reasoning_content": " "}
    assert answers(CHATML, chat("?", empty)) == [ANSWER]


JOINED_CALLS = CHATML.replace(
    "+ '<|im_end|>", "+ (m.tool_calls or [{'function': {'arguments': ''}}])[0].function.arguments + '<|im_end|>"
)
"""Joins the arguments of a call to texts, as some templates do."""


@pytest.mark.parametrize("template", [JOINED_CALLS, LAST_THOUGHTS])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_calls_suit_the_template(template: str, arguments: Any, answers: Callable[..., list[str]]) -> None:
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    row = chat("?", call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": ANSWER})
    assert answers(template, row) == [ANSWER]  # the text beside a call is context


def test_calls_of_tools_are_no_answer(answers: Callable[..., list[str]]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    row = chat("?", call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": ANSWER})
    assert answers(LAST_THOUGHTS, row) == [ANSWER]
    assert answers(CHATML, row) == [ANSWER]


def test_tools_reach_the_template(tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = LAST_THOUGHTS
    row = {**chat("?", ANSWER), "tools": [{"name": "add"}], "chat_template_kwargs": {"loud": True}}
    found = render(conversation(row), tokenizer)
    assert found.text.startswith('Tools: [{"name": "add"}]\n')
    assert found.left_out == ["loud"]


GENERATION = CHATML.replace("m['content'] +", "'' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{")
"""With the marks by which transformers itself finds answers."""


@pytest.mark.parametrize("template", [GENERATION, {"default": CHATML, "tool_use": CHATML, "rag": "{{ 1 / 0 }}"}])
@pytest.mark.parametrize("said", ["a", thought()])
def test_templates_with_marks_and_several_templates_of_a_base(template: Any, said: Any, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    for options in ({}, {"tools": [{"name": "add"}]}):
        found = render(conversation({**chat("?", said), **options}), tokenizer)
        assert [found.text[start:end] for start, end in found.answers] == [said if said == "a" else INLINE[0]]
        assert found.left_out == [*options]


def test_a_template_that_tells_the_date_tells_the_same_one_tomorrow(tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = DATED
    assert render(conversation(chat("?", ANSWER)), tokenizer).text.startswith(f"Today: {CLOCK:%d %b %Y}\n")


def test_an_answer_that_a_template_changes_is_no_answer(answers: Callable[..., list[str]]) -> None:
    loud = CHATML.replace("m['content']", "m['content'] | upper")
    for row in (chat("?", ANSWER), chat("?", "b", "?", ANSWER)):
        with pytest.raises(ValueError, match="changes the completion's text"):
            answers(loud, row)
    with pytest.raises(ValueError, match="private signs"):
        answers(CHATML, chat("\ue0000\uf8ff", ANSWER))
