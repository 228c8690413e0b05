"""One row of a target -> token ids and masks: the chat template rendered, and the answer found in it.

A row has `messages` (the last one is the assistant's answer: the completion) or `prompt` and `completion`, each a text or a
list of messages, as TRL has them. The base model's own chat template is applied; a base without one gets prompt and
completion joined as they are.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.core.errors import for_display
from pipeline.core.storage import Folder, is_text
from pipeline.core.tables import SAMPLES
from pipeline.data.shards import Lines, write_shard
from pipeline.model.base_model import load_tokenizer

STAND_IN = "\ue000\uf8ff\ue000"
"""Stands for an answer: private signs of Unicode, which no template knows or strips."""


MAX_PROBLEM = 200
"""Characters of a reason to pass a row over."""

AT_ONCE = 1000
"""Rows that are Python objects at the same time."""

TOKENISED = pa.schema(
    [
        ("role", pa.string()),
        ("problem", pa.string()),
        ("draw_key", pa.uint64()),
        *(field for field in SAMPLES if field.name != "split"),
    ]
)


def tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int = sys.maxsize) -> dict[str, Any]:
    """Token ids of a row, up to the end of its answer, with the masks of `tables.SAMPLES`.

    A token belongs to the completion if it covers a character of the answer. What the chat template adds around the answer
    does not; the first token after the answer, the end of the turn, is learned but not scored.

    Raises:
        ValueError: the row has no prompt or completion of a known form, or more than `max_tokens`; the message says which.
    """
    messages = _messages(row)
    text, start, end = _render(messages, tokenizer)
    if end > max_tokens * _longest_entry(tokenizer):  # it can never fit, and a tokenizer takes minutes over a line of 50 MB
        raise ValueError(f"longer than {max_tokens} tokens")
    encoded = tokenizer(text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    inside = [left < end and right > start and right > left for left, right in offsets]
    if not any(inside):
        raise ValueError("empty completion")
    last = max(index for index, flag in enumerate(inside) if flag)
    turn_ends = last + 1 < len(ids)
    if tokenizer.chat_template is None and tokenizer.eos_token_id is not None:
        ids, turn_ends = [*ids[: last + 1], tokenizer.eos_token_id], True
    length = last + 1 + turn_ends
    if length > max_tokens:
        raise ValueError(f"longer than {max_tokens} tokens")
    mask = [*inside, False][:length]
    if not any(mask[1:]):
        raise ValueError("nothing comes before its completion")
    learn = [*mask[: last + 1], *([True] * turn_ends)]
    return {"input_ids": ids[:length], "completion_mask": mask, "learn_mask": learn}


def tokenise_batch(batch: pa.Table, role: str, base: str, seed: int, max_tokens: int) -> pa.Table:
    """Rows of schema TOKENISED; a row that cannot be used has only its `problem`."""
    tokenizer = load_tokenizer(base)
    rows = [tokenise_text(text, tokenizer, seed, max_tokens) for text in batch["row"].to_pylist()]
    return pa.Table.from_pylist([{"role": role, **row} for row in rows], schema=TOKENISED)


def tokenise_shard(batch: pa.Table, folder: Folder, role: str, base: str, seed: int, max_tokens: int) -> pa.Table:
    """What can be used of some rows, as a shard in `folder`; its report, schema SHARDS.

    Args:
        batch: as `read_rows` gives them.
    """
    written = batch.filter(pa.array(_written(batch), pa.bool_()))
    starts = range(0, max(1, len(written)), AT_ONCE)
    found = pa.concat_tables([tokenise_batch(written.slice(start, AT_ONCE), role, base, seed, max_tokens) for start in starts])
    return write_shard(folder, role, found, _lines(batch, written, found))


def tokenise_text(text: bytes, tokenizer: PreTrainedTokenizerBase, seed: int, max_tokens: int) -> dict[str, Any]:
    """Columns of TOKENISED, `role` apart, of a row as JSON text; of one that cannot be used only its `problem`."""
    row = _parse(text)
    if row is None:
        return {"problem": "malformed"}
    try:
        tokens = tokenise(row, tokenizer, max_tokens)
    except ValueError as error:
        return {"problem": str(error)}
    content = np.array(tokens["input_ids"], dtype="<i4").tobytes() + np.array(tokens["completion_mask"], dtype="<u1").tobytes()
    sample_id = hashlib.sha256(content).hexdigest()[:32]
    key = hashlib.sha256(f"{seed} {sample_id}".encode()).digest()[:8]
    return {"draw_key": int.from_bytes(key, "little"), "sample_id": sample_id, **tokens}


def _written(batch: pa.Table) -> Iterator[bool]:
    """Whether each row is no blank line."""
    for start in range(0, len(batch), AT_ONCE):
        yield from (bool(row.strip()) for row in batch["row"].slice(start, AT_ONCE).to_pylist())


def _lines(batch: pa.Table, written: pa.Table, found: pa.Table) -> Lines:
    if "block" not in batch.column_names:
        return Lines({}, [])
    numbers, counts = np.unique(batch["block"].to_numpy(), return_counts=True)
    malformed = written["block"].filter(pc.equal(found["problem"], "malformed"))
    return Lines(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), pc.unique(malformed).to_pylist())


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif row.get("prompt") is not None and "completion" in row:
        messages = [*_turns(row["prompt"], "user"), *_turns(row["completion"], "assistant")]
    else:
        raise ValueError("neither messages nor prompt and completion")
    if not messages or not all(isinstance(turn, dict) and _is_said(turn) for turn in messages):
        raise ValueError("a message without text or role")
    if not all(is_text(turn["role"] + turn["content"]) for turn in messages):
        raise ValueError("a text that is not valid Unicode")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is of role {messages[-1]['role'][:20]!r}; it must be the assistant's")
    if len(messages) < 2:
        raise ValueError("an answer without a question")
    if messages[-1].get("tool_calls"):
        raise ValueError("its answer calls tools, which are no text to learn")
    if not messages[-1]["content"].strip():
        raise ValueError("empty completion")
    return messages


def _is_said(turn: dict[str, Any]) -> bool:
    return isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _turns(value: Any, role: str) -> list[dict[str, str]]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": "" if value is None else value}]


@lru_cache(maxsize=4)
def _longest_entry(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest entry of the vocabulary: no token covers more of a text, but one for unknown signs may."""
    return max(map(len, tokenizer.get_vocab()))


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, int]:
    """The whole text, and the range of its characters that is the answer: what stands before all that follows an answer. From
    the front it cannot be found, as thoughts or the template's own words before it may hold the same characters."""
    answer = messages[-1]["content"]
    if tokenizer.chat_template is None:
        prompt = "".join(turn["content"] for turn in messages[:-1])
        return prompt + answer, len(prompt), len(prompt) + len(answer)
    text = _apply_template(messages, tokenizer)
    _, found, after = _apply_template([*messages[:-1], {**messages[-1], "content": STAND_IN}], tokenizer).partition(STAND_IN)
    if found and STAND_IN not in after and text.endswith(after):
        end = len(text) - len(after)
        for wanted in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):  # some templates strip the answer
            if text.endswith(wanted, 0, end):
                return text, end - len(wanted), end
    raise ValueError("the chat template changes the completion's text")


def _apply_template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ValueError(for_display(f"the chat template refuses it: {error}", MAX_PROBLEM)) from error
    except Exception as error:  # templates are programs, and other fields of a message may be anything
        raise ValueError(f"the chat template fails ({type(error).__name__})") from error
    if not is_text(text):
        raise ValueError("a text that is not valid Unicode")
    return text
