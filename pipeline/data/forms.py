"""One row of a target -> the conversation that it holds. What trainers and the Hub's data sets have is read:

    messages                            role and content, as OpenAI, TRL and axolotl have them
    conversations                       the same, or `from` and `value`, as ShareGPT has them
    prompt, completion                  texts or lists of messages, as TRL has them
    chosen, and rejected or a prompt    of preferences the chosen answer, to a prompt of one of the other forms; chosen alone may
                                        be a whole conversation
    instruction, input, output          as Alpaca has them; `history` holds earlier pairs
    text                                learned as it is, without a chat template

`system` (or `system_prompt`), `tools` and `chat_template_kwargs` of a row go with it; `choices` are the answers that it might
have, for a metric over them. A list or an object may also be JSON text, as in a CSV file. Where a row has several forms, the
first one counts. `target.columns` says what a column is called in place of these names.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core.storage import is_text

Row = Mapping[str, Any]
Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Names of roles that mean another; others are left to the chat template."""

PLAIN_ROLES = ("system", "developer", "user", "assistant", "tool")
"""That may also be written in capitals."""

CALLS = ("function_call", "tool_call")
"""Roles of LLaMA-Factory's and of ms-swift's: the assistant calls a tool, or several."""

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold a list of messages."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message for what the model thinks before it answers."""

LEARNED = ("train", "training", "trainable", "loss", "loss_mask", "weight")
"""Fields of a message by which axolotl, ms-swift, verl, AgentInstruct and OpenAI say whether it is learned."""

FORMS = "messages, conversations, prompt and completion, prompt and chosen, instruction and output, or text"

MAX_SHOWN = 10
"""Columns of a row that a message names."""


class RowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """`messages` end with an answer; each has the texts `role` and `content`."""

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given, such as tools."""
    texts: bool = False
    """Whether prompt and answer are texts, which a base without a chat template gets joined as they are."""
    bare: bool = False
    """Whether it is one text, which no chat template is asked about."""


def conversation(row: Row, columns: Mapping[str, str] | None = None) -> Conversation:
    """What a row says.

    Args:
        columns: names of `config.COLUMNS` -> what they are called in the row.

    Raises:
        RowError: the row is of no known form, or holds no answer that is text.
    """
    row = _named(row, columns or {})
    for is_of_form, read in _FORMS:
        if is_of_form(row):
            found = read(row)
            if not found.bare:
                _require_wanted(row)
            return _to_the_last_answer(found)
    shown = sorted(f"{str(name)[:40]}{' (empty)' * (value == [])}" for name, value in row.items() if value is not None)
    has = ", ".join(shown[:MAX_SHOWN]) or "nothing"
    raise RowError(f"of no known form: it has {has}; rows need {FORMS} (target.columns names others)")


def choices(row: Row, said: Conversation, columns: Mapping[str, str] | None = None) -> list[Conversation]:
    """The conversation of a row with each of its choices as the last answer, between the blanks that the answer has around it.

    Args:
        said: what `conversation` makes of the row.

    Raises:
        RowError: the row has no list of choices, or its answer is none of them.
    """
    texts = _parsed(_named(row, columns or {}).get("choices"))
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("without a list of two choices or more, all texts")
    last = said.messages[-1]
    answer = last["content"].strip()
    if answer not in map(str.strip, texts):
        raise RowError("with an answer that is none of its choices")
    before, _, after = last["content"].partition(answer)
    turns = [{**last, "content": before + text.strip() + after} for text in texts]
    return [replace(said, messages=[*said.messages[:-1], turn]) for turn in turns]


def _require_wanted(row: Row) -> None:
    """TRL's and LLaMA-Factory's preferences without pairs say of an answer whether it is wanted."""
    for name in ("label", "kto_tag"):
        if str(row.get(name)).lower() == "false":  # as text from a CSV file
            raise RowError(f"{name}: false, which says that its answer is not wanted")


def _named(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names. A column that is renamed is not also what it was called."""
    renamed = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in renamed and name not in columns}
    return kept | {name: row.get(column) for name, column in columns.items()}


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) not in (None, []) for name in names)


def _from_messages(name: str) -> Callable[[Row], Conversation]:
    return lambda row: _chat(_as_list(row[name], name), row)


def _from_completion(row: Row) -> Conversation:
    prompt, answer = _messages_or_text(row["prompt"]), _messages_or_text(row["completion"])
    turns = [*_turns(prompt, "user"), *_turns(answer, "assistant")]
    return _chat(turns, row, texts=not isinstance(prompt, list) and not isinstance(answer, list))


def _from_chosen(row: Row) -> Conversation:
    prompt, chosen = _prompt_of(row), _messages_or_text(row["chosen"])
    if isinstance(chosen, Mapping):
        chosen = [chosen]
    whole = isinstance(chosen, list) and (prompt is None or _begins_with_question(chosen))
    if prompt is None and not whole:
        raise RowError("a chosen answer without a prompt")
    turns = [*_system_of(prompt, chosen), *chosen] if whole else [*_turns(prompt, "user"), *_turns(chosen, "assistant")]
    return _chat(turns, row, texts=not isinstance(prompt, list) and not isinstance(chosen, list))


def _system_of(prompt: Any, chosen: list[Any]) -> list[Any]:
    """The system message of a prompt that a whole conversation repeats without it."""
    return prompt[:1] if _first_role(prompt) == "system" != _first_role(chosen) else []


def _prompt_of(row: Row) -> Any:
    """What a preference is about: text or messages; None: there is nothing."""
    for name in ("prompt", *CONVERSATIONS):
        if row.get(name) not in (None, []):
            return _messages_or_text(row[name])
    return _joined(row["instruction"], row.get("input")) if row.get("instruction") is not None else None


def _from_instruction(row: Row) -> Conversation:
    earlier = _as_list(row["history"], "history") if row.get("history") is not None else []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise RowError("a history that is no list of pairs")
    pairs = [*earlier, [_joined(row["instruction"], row.get("input")), row["output"]]]
    turns = [turn for asked, said in pairs for turn in (_turn("user", asked), _turn("assistant", said))]
    return _chat(turns, row, texts=not earlier)


def _from_text(row: Row) -> Conversation:
    return Conversation([_turn("assistant", row["text"])], texts=True, bare=True)


_FORMS: Sequence[tuple[Callable[[Row], bool], Callable[[Row], Conversation]]] = (
    (_has("chosen", "rejected"), _from_chosen),
    *((_has(name), _from_messages(name)) for name in CONVERSATIONS),
    (lambda row: row.get("prompt") is not None and "completion" in row, _from_completion),
    (_has("chosen"), _from_chosen),
    (_has("instruction", "output"), _from_instruction),
    (_has("text"), _from_text),
)
"""In the order in which they count."""


def _chat(turns: Sequence[Any], row: Row, texts: bool = False) -> Conversation:
    messages = [_message(turn) for turn in turns]
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages, texts = [_turn("system", system), *messages], False
    options = _parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise RowError("chat_template_kwargs that are no object")
    if tools := _parsed(row.get("tools")):
        options = {"tools": tools if isinstance(tools, list) else [tools], **options}
    return Conversation(messages, options, texts)


def _message(turn: Any) -> Message:
    """A message with `role` and `content`, whatever they are called in it; fields without a value are left out."""
    if not isinstance(turn, Mapping):
        raise RowError("a message without text or role")
    kept = {name: value for name, value in turn.items() if value is not None and name not in ("from", "value")}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise RowError("a message without text or role")
    content = _text_of(content)
    if role.lower() in CALLS:
        return _calls(kept, content)
    if content is None and not kept.get("tool_calls"):
        raise RowError("a message without text or role")
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_parsed_arguments(call) for call in kept["tool_calls"]]
    return {**kept, "role": _plain_role(role), "content": content or ""}  # null beside calls: templates join texts


def _with_parsed_arguments(call: Any) -> Any:
    """A call of a tool whose arguments are an object, as chat templates take them; OpenAI has them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := _parsed(function.get("arguments")), dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _plain_role(role: str) -> str:
    lower = role.lower()
    return ROLES.get(lower, lower if lower in PLAIN_ROLES else role)


def _calls(kept: Message, content: str | None) -> Message:
    """Of one of the roles CALLS, whose text is the call, or a list of calls."""
    found = _parsed(content)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError("a call of a tool that is not JSON with its name")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    called = [{"type": "function", "function": function} for function in functions]
    return {**kept, "role": "assistant", "content": "", "tool_calls": called}


def _text_of(content: Any) -> str | None:
    """Content as text: it may come in parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("a message without text or role")
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        kinds = sorted({str(part.get("type"))[:20] for part in content if isinstance(part, dict) and part.get("text") is None})
        raise RowError(f"a message with parts that are no text ({', '.join(kinds) or 'of no known form'})")
    return "".join(str(part) for part in parts)


def is_learned(turn: Message) -> bool:
    """Whether a message does not say that it is context alone; no and 0 say so, which are equal."""
    return not any(turn.get(name) in (False, "false", "False") for name in LEARNED)


def _to_the_last_answer(found: Conversation) -> Conversation:
    """The conversation without what is said behind its last answer: nothing of that is learned, and no token before it sees it.

    Raises:
        RowError: there is no answer to learn.
    """
    answers = [place for place, turn in enumerate(found.messages) if is_answer(turn)]
    if answers and not found.bare:
        found = replace(found, messages=found.messages[: answers[-1] + 1])
    _check(found)
    return found


def is_answer(turn: Message) -> bool:
    """Whether a message is text of the assistant's; the text beside a call of tools is context."""
    return turn["role"] == "assistant" and bool(turn["content"].strip()) and not turn.get("tool_calls")


def _check(found: Conversation) -> None:
    messages = found.messages
    if not messages:
        raise RowError("a message without text or role")
    if not all(_is_unicode(turn) for turn in messages):
        raise RowError("a text that is not valid Unicode")
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"the last message is of role {last['role'][:20]!r}; it must be the assistant's")
    if len(messages) < 2 and not found.bare:
        raise RowError("an answer without a question")
    if last.get("tool_calls"):
        raise RowError("its answer calls tools, which are no text to learn")
    if not last["content"].strip():
        raise RowError("empty completion")


def _is_unicode(turn: Message) -> bool:
    texts = [turn[name] for name in ("role", "content", *THOUGHTS) if isinstance(turn.get(name), str)]
    return is_text("".join(texts))


def _turn(role: str, content: Any) -> Message:
    if content is not None and not isinstance(content, str):
        raise RowError("a message without text or role")
    return {"role": role, "content": "" if content is None else content}


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [_turn(role, value)]


def _begins_with_question(turns: list[Any]) -> bool:
    return _first_role(turns) not in (None, "assistant")


def _first_role(turns: Any) -> str | None:
    """Whose the first message is; None: there is none."""
    first = turns[0] if isinstance(turns, list) and turns else None
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return _plain_role(role) if isinstance(role, str) else None


def _messages_or_text(value: Any) -> Any:
    """Messages that are given as JSON text. A text that is JSON of something else is a text."""
    found = _parsed(value)
    is_said = isinstance(found, list) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in found)
    return found if isinstance(value, list) or (found and is_said) else value


def _joined(instruction: Any, given: Any) -> Any:
    return f"{instruction}\n{given}" if isinstance(instruction, str) and isinstance(given, str) and given.strip() else instruction


def _as_list(value: Any, name: str) -> list[Any]:
    found = _parsed(value)
    if not isinstance(found, list):
        raise RowError(f"{name} that are no list")
    return found


def _parsed(value: Any) -> Any:
    """A list or an object that is given as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list | dict) else value
    return value
