"""One row of a target -> token ids and masks of what its answers are (`forms.py`, `render.py`)."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from pipeline.core.storage import Folder
from pipeline.core.tables import CHOICE, TEST
from pipeline.data.forms import Conversation, RowError, choices, conversation
from pipeline.data.render import Turns, render
from pipeline.data.shards import Lines, write_shard
from pipeline.model.base_model import load_tokenizer

MALFORMED = "malformed"
"""The problem of a line that is no JSON object."""

AT_ONCE = 1000
"""Rows that are Python objects at the same time."""

TOKENISED = pa.schema(
    [
        ("role", pa.string()),
        ("problem", pa.string()),
        ("note", pa.string()),  # of a row that is used, what else is to be said of it
        ("draw_key", pa.uint64()),
        *(field for field in TEST if field.name != "split"),
    ]
)


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    max_tokens: int = sys.maxsize
    too_long: Literal["drop", "cut"] = "drop"
    """What becomes of a row of more tokens: it is passed over, or loses its first ones."""
    turns: Turns = "all"
    """Of which answers in a conversation all tokens count."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """As of `forms.conversation`."""
    choices: bool = False
    """Whether the choices of a row are tokenised, too."""
    vocabulary: int = sys.maxsize
    """Embeddings of the base: its tokenizer may have tokens beyond them."""


def tokenise(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, reading: Reading = Reading()) -> dict[str, Any]:
    """Token ids of a row, up to the end of its last answer, with the masks of `tables.SAMPLES`, its choices as of `tables.TEST`
    where they are asked for, and what is to be said of it.

    A token belongs to the completion if it covers a character of an answer. What the chat template adds around an answer
    does not. The end of the turn is learned but not scored: the first token after an answer, and where blanks stand between the
    answer and a special token, these and that one.

    Raises:
        RowError: the row has no answer of a known form, or too many tokens; the message says which.
    """
    said = conversation(row, reading.columns)
    tokens, notes = _tokens(said, tokenizer, reading)
    found: dict[str, Any] = tokens._asdict()
    if reading.choices:
        try:
            found["choices"] = _choices(choices(row, said, reading.columns), tokenizer, reading)
        except RowError as problem:
            notes.append(str(problem))
    return found | ({"note": "; ".join(notes)} if notes else {})


class _Masked(NamedTuple):
    """By the names of `tables.SAMPLES`."""

    input_ids: list[int]
    completion_mask: list[bool]
    learn_mask: list[bool]


def _choices(said: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, reading: Reading) -> list[dict[str, Any]]:
    """One row several times, each time with another answer.

    Raises:
        RowError: one of them cannot be used.
    """
    only_last = replace(reading, turns="last")
    try:
        tokens = [_tokens(one, tokenizer, only_last)[0]._asdict() for one in said]
    except RowError as problem:
        raise RowError(f"with choices {problem}") from problem
    return [{field.name: one[field.name] for field in CHOICE} for one in tokens]


def _tokens(said: Conversation, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> tuple[_Masked, list[str]]:
    """The tokens of a conversation, and what is to be said of them.

    Raises:
        RowError: as for `tokenise`.
    """
    text, answers, left_out = render(said, tokenizer, reading.turns)
    end, limit = answers[-1][1], reading.max_tokens
    if reading.too_long == "drop" and end > limit * _longest_entry(tokenizer):
        raise RowError(f"longer than {limit} tokens")  # a tokenizer takes minutes over a line of 50 MB
    plain = said.bare or tokenizer.chat_template is None
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    end_token = tokenizer.eos_token_id if plain else None
    covered, special = list(_covered(encoded["offset_mapping"])), _special_ids(tokenizer)
    ends = _ends(text, encoded["input_ids"], covered, special)
    ids, mask, learn = _masked(encoded["input_ids"], covered, answers, ends, end_token)
    if (highest := max(ids)) >= reading.vocabulary:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise RowError(f"a token that the base has no embedding for ({token!r}, {highest} of {reading.vocabulary})")
    notes = [f"{name} that the chat template does not know" for name in left_out]
    if mask[-1]:
        notes.append("without an end of the last answer that could be learned")
    if len(ids) > limit:
        if reading.too_long == "drop":
            raise RowError(f"longer than {limit} tokens")
        kept = [0] * (ids[0] == tokenizer.bos_token_id)  # where a text begins
        kept += range(len(ids) - limit + len(kept), len(ids))
        ids, mask, learn = [ids[n] for n in kept], [mask[n] for n in kept], [learn[n] for n in kept]
        notes.append(f"cut to its last {limit} tokens")
    if not any(mask[1:]):
        raise RowError("nothing comes before its completion")
    return _Masked(ids, mask, learn), notes


def _covered(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Which characters each token covers. Of one of blanks alone some tokenizers tell where it ends, and no width."""
    before = 0
    for left, right in offsets:
        yield (min(before, right) if left == right else left), right
        before = max(before, right)


def _ends(text: str, ids: list[int], covered: Sequence[tuple[int, int]], special: frozenset[int]) -> Callable[[int], int]:
    """From the last token of an answer to the last of the end of its turn."""

    def end(last: int) -> int:
        behind = last + 1
        while behind < len(ids) and ids[behind] not in special and text[slice(*covered[behind])].isspace():
            behind += 1
        found = behind if behind < len(ids) and ids[behind] in special else last + 1
        return min(found, len(ids) - 1)

    return end


def _masked(
    ids: list[int],
    covered: Sequence[tuple[int, int]],
    answers: Sequence[tuple[int, int]],
    end_of: Callable[[int], int],
    end_token: int | None,
) -> _Masked:
    """Tokens up to the end of the last answer's turn; `end_token` is that end where the text holds none."""
    inside = [any(left < end and right > start and right > left for start, end in answers) for left, right in covered]
    if not any(inside):
        raise RowError("empty completion")
    lasts = [place for place, (here, after) in enumerate(zip(inside, [*inside[1:], False], strict=True)) if here and not after]
    if end_token is not None:
        ids, learn = [*ids[: lasts[-1] + 1], end_token], [*inside[: lasts[-1] + 1], True]
    else:
        learn = list(inside)
        for last in lasts:
            learn[last : end_of(last) + 1] = [True] * (end_of(last) + 1 - last)
        ids, learn = ids[: end_of(lasts[-1]) + 1], learn[: end_of(lasts[-1]) + 1]
    return _Masked(ids, [*inside[: lasts[-1] + 1], *[False] * (len(ids) - lasts[-1] - 1)], learn)


def tokenise_batch(batch: pa.Table, role: str, base: str, seed: int, reading: Reading) -> pa.Table:
    """Rows of schema TOKENISED; a row that cannot be used has only its `problem`."""
    tokenizer = load_tokenizer(base)
    rows = [tokenise_text(text, tokenizer, seed, reading) for text in batch["row"].to_pylist()]
    return pa.Table.from_pylist([{"role": role, **row} for row in rows], schema=TOKENISED)


def tokenise_shard(batch: pa.Table, folder: Folder, role: str, base: str, seed: int, reading: Reading) -> pa.Table:
    """What can be used of some rows, as a shard in `folder`; its report, schema SHARDS.

    Args:
        batch: as `read_rows` gives them.
    """
    written = batch.filter(pa.array(_written(batch), pa.bool_()))
    starts = range(0, max(1, len(written)), AT_ONCE)
    found = pa.concat_tables([tokenise_batch(written.slice(start, AT_ONCE), role, base, seed, reading) for start in starts])
    return write_shard(folder, role, found, _lines(batch, written, found))


def tokenise_text(text: bytes, tokenizer: PreTrainedTokenizerBase, seed: int, reading: Reading) -> dict[str, Any]:
    """Columns of TOKENISED, `role` apart, of a row as JSON text; of one that cannot be used only its `problem`."""
    try:
        tokens = tokenise(parse(text), tokenizer, reading)
    except RowError as error:
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
    malformed = written["block"].filter(pc.equal(found["problem"], MALFORMED))
    return Lines(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), pc.unique(malformed).to_pylist())


def parse(text: bytes) -> dict[str, Any]:
    """A row from its JSON text.

    Raises:
        RowError: it is no JSON object.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(MALFORMED) from error
    if not isinstance(row, dict):
        raise RowError(MALFORMED)
    return row


@lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = (place for place, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


@lru_cache(maxsize=4)
def _longest_entry(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest entry of the vocabulary: no token covers more of a text, but one for unknown signs may."""
    return max(map(len, tokenizer.get_vocab()))
