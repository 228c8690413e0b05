"""A conversation -> the text that a model sees, and where in it the answers are.

The base model's own chat template is applied. Where an answer is in what it gives is found by asking it once more, with stand-ins
in place of the answers: what stands between these must stand in the text, too, and what is left there are the answers. A search
for the answer's own words would also find them elsewhere, as in thoughts or in what the template adds.

Thoughts count as part of their answer, whether they stand in its text between <think> and </think> or in a field of the message.
Many templates leave out those of earlier turns; they are then in no text, and the answer alone counts.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.core.errors import for_display
from pipeline.core.storage import is_text
from pipeline.data.forms import THOUGHTS, Conversation, Message, RowError, is_answer, is_learned

Turns = Literal["all", "last"]

CLOCK = datetime(2024, 7, 26, tzinfo=UTC)
"""What templates that tell the date are told, so that a row is the same row tomorrow."""

OPEN, SHUT = "\ue000", "\uf8ff"
"""Around the number of a stand-in: private signs of Unicode, which no template knows or strips."""

STAND_IN = re.compile(f"{OPEN}(\\d+){SHUT}")

THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
"""An answer with what was thought before it, in one text."""

THINK = re.compile(r"<think>\s*$")

LAST_THOUGHTS = "thoughts before the last answer"
"""That a template leaves out, as told of a row."""

SHOWN = ("system", "user", "tool")
"""Roles that most templates know: what is said in these is looked for in the text, before the template is asked."""

MAX_ROLE = 20
"""Characters of a role that are told."""

MAX_PROBLEM = 200
"""Characters of a reason to pass a row over."""


class Rendered(NamedTuple):
    """`answers` are ranges of characters of `text`, in their order; `left_out`: what of a row the template does not know."""

    text: str
    answers: list[tuple[int, int]]
    left_out: list[str]


class _Slot(NamedTuple):
    """A text of a message in whose place a stand-in is put; `turn`: of the answer that it is, or that it is thought before."""

    text: str
    turn: int
    is_answer: bool


def render(said: Conversation, tokenizer: PreTrainedTokenizerBase, turns: Turns = "all") -> Rendered:
    """
    Raises:
        RowError: the template refuses the messages or changes an answer's text, or there is none for them.
    """
    if said.bare:
        return Rendered(text := said.messages[-1]["content"], [(0, len(text))], [])
    if tokenizer.chat_template is None:
        return _joined(said)
    messages = _with_known_thoughts(said.messages, tokenizer)
    answers = [n for n, turn in enumerate(messages) if is_answer(turn) and is_learned(turn)]
    if not answers:
        raise RowError("none of its answers is to be learned")
    apply = lambda given: _apply_template(given, said.options, tokenizer)  # noqa: E731
    try:
        text = apply(messages)
    except RowError:
        messages = _with_text_arguments(messages)
        text = apply(messages)
    if STAND_IN.search(text):
        raise RowError("a text with private signs of Unicode")
    found = _found(text, messages, answers if turns == "all" else answers[-1:], apply)
    if found is None and answers == [len(messages) - 1]:
        found = _before_what_follows(text, messages, apply)
    if found is None:
        raise RowError("the chat template changes the completion's text")
    template = tokenizer.get_chat_template(tools=said.options.get("tools"))  # of several that a base may have
    left_out = [name for name in said.options if not re.search(rf"\b{re.escape(name)}\b", template)]
    left_out += [f"a message of role {role[:MAX_ROLE]!r}" for role in _unshown(text, messages, apply)]
    if _lacks_its_thoughts(text, messages[answers[-1]]):
        left_out.append(LAST_THOUGHTS)
    return Rendered(text, found, sorted(left_out))


def _unshown(text: str, messages: Sequence[Message], apply: Callable[[Sequence[Message]], str]) -> set[str]:
    """Roles of messages, other than the assistant's, that the template leaves out: many show those alone that they know."""
    roles = set[str]()
    for n, turn in enumerate(messages):
        said = turn["content"].strip()
        if turn["role"] == "assistant" or not said or (turn["role"] in SHOWN and said in text):
            continue
        try:
            shown = apply([*messages[:n], {**turn, "content": f"{OPEN}0{SHUT}"}, *messages[n + 1 :]])
        except RowError:  # it wants other words there, so that it reads them
            continue
        if not STAND_IN.search(shown):
            roles.add(turn["role"])
    return roles


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """Calls of tools with their arguments as JSON text, for templates that join them to others."""
    return [
        {**turn, "tool_calls": [_with_text(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _lacks_its_thoughts(text: str, answer: Message) -> bool:
    """Whether what was thought before an answer is nowhere in the text."""
    inline = THOUGHT.fullmatch(answer["content"])
    thoughts = [inline[2] if inline else "", *(answer[name] for name in THOUGHTS if isinstance(answer.get(name), str))]
    return any(one.strip() and one.strip() not in text for one in thoughts)


def _joined(said: Conversation) -> Rendered:
    if not said.texts:
        raise RowError("messages, and the base has no chat template; give prompt and completion as texts")
    prompt, answer = "".join(turn["content"] for turn in said.messages[:-1]), said.messages[-1]["content"]
    return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))], sorted(said.options))


def _found(
    text: str, messages: Sequence[Message], answers: Sequence[int], apply: Callable[[Sequence[Message]], str]
) -> list[tuple[int, int]] | None:
    """Where the answers of these messages are in the text; None: the text is not that of the stand-ins with other answers."""
    slots: list[_Slot] = []
    marked = [_marked(turn, n, slots) if n in answers else turn for n, turn in enumerate(messages)]
    parts = STAND_IN.split(apply(marked))
    literals, shown = parts[::2], [slots[int(number)] for number in parts[1::2]]
    if [slot.turn for slot in shown if slot.is_answer] != [*answers]:
        return None
    at, starts, found = len(literals[0]), dict[int, int](), list[tuple[int, int]]()
    if not text.startswith(literals[0]):
        return None
    for slot, before, after in zip(shown, literals, literals[1:], strict=False):
        shape = next((one for one in _shapes(slot.text) if text.startswith(one + after, at)), None)
        if shape is None:
            return None
        opening = THINK.search(before)
        starts.setdefault(slot.turn, at if slot.is_answer or not opening else at - len(opening[0]))
        if slot.is_answer:
            found.append((starts[slot.turn], at + len(shape)))
        at += len(shape) + len(after)
    return found if at == len(text) else None


def _marked(turn: Message, number: int, slots: list[_Slot]) -> Message:
    """A message with stand-ins in place of its answer and of what is thought before it; these are added to `slots`."""

    def stand_in(text: str, is_answer: bool) -> str:
        slots.append(_Slot(text, number, is_answer))
        return f"{OPEN}{len(slots) - 1}{SHUT}"

    field = next((name for name in THOUGHTS if isinstance(turn.get(name), str) and turn[name].strip()), None)
    if field:
        return {**turn, field: stand_in(turn[field], False), "content": stand_in(turn["content"], True)}
    if (inline := THOUGHT.fullmatch(turn["content"])) and inline[2]:
        opening, thought, closing, answer = inline.groups()
        return {**turn, "content": opening + stand_in(thought, False) + closing + stand_in(answer, True)}
    return {**turn, "content": stand_in(turn["content"], True)}


def _before_what_follows(
    text: str, messages: Sequence[Message], apply: Callable[[Sequence[Message]], str]
) -> list[tuple[int, int]] | None:
    """Where the last answer is, in a text that has other words before it than with a stand-in: at the end, before all that
    follows an answer."""
    answer = messages[-1]["content"]
    _, shown, after = apply([*messages[:-1], {**messages[-1], "content": f"{OPEN}0{SHUT}"}]).partition(f"{OPEN}0{SHUT}")
    end = len(text) - len(after)
    if not shown or STAND_IN.search(after) or not text.endswith(after):
        return None
    return next(([(end - len(one), end)] for one in _shapes(answer) if text.endswith(one, 0, end)), None)


def _shapes(text: str) -> tuple[str, ...]:
    """What a template may make of a text of a message: some strip it."""
    return text, text.rstrip(), text.lstrip(), text.strip()


def _with_known_thoughts(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """What was thought, in the field that the template knows; in the text where it knows none."""
    if not any(isinstance(turn.get(name), str) for turn in messages for name in THOUGHTS):
        return messages
    known = _known_field(tokenizer.get_chat_template(), tokenizer)
    return [_with_known_thought(turn, known) for turn in messages]


def _with_known_thought(turn: Message, known: str | None) -> Message:
    field = next((name for name in THOUGHTS if isinstance(turn.get(name), str)), None)
    if field in (None, known) or turn["role"] != "assistant":
        return turn
    kept = {name: value for name, value in turn.items() if name not in THOUGHTS}
    if not turn[field].strip():
        return kept
    if known:
        return {**kept, known: turn[field]}
    return {**kept, "content": f"<think>\n{turn[field].strip()}\n</think>\n\n{turn['content']}"}


@lru_cache(maxsize=8)
def _known_field(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The field of a message from which a template shows what was thought, if it does from any."""
    for name in THOUGHTS:
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: f"{OPEN}0{SHUT}"}]
        try:
            if STAND_IN.search(_apply_template(asked, {}, tokenizer)):
                return name
        except RowError:
            continue
    return None


def _apply_template(messages: Sequence[Message], options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    given = {"strftime_now": CLOCK.strftime, **options}
    try:
        text = str(tokenizer.apply_chat_template([*messages], tokenize=False, **given))
    except TemplateError as error:
        raise RowError(for_display(f"the chat template refuses it: {error}", MAX_PROBLEM)) from error
    except Exception as error:  # templates are programs, and other fields of a message may be anything
        raise RowError(f"the chat template fails ({type(error).__name__})") from error
    if not is_text(text):
        raise RowError("a text that is not valid Unicode")
    return text
