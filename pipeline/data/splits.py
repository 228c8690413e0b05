"""Target data -> tokenised rows with completion masks: a small sample to search with, and the training splits.

A row has `messages` (the last one is the assistant's answer: the completion) or `prompt` and `completion`, each a text or a
list of messages, as TRL has them. The base model's own chat template is applied; a base without one gets prompt and
completion joined as they are.

Which rows are drawn depends on their content and the seed alone, not on their order or on how Ray splits the files: each
row has a place, the hash of seed and content, and the draw takes the lowest places.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.core.errors import InputError, may_pass, one_line, shown
from pipeline.core.storage import Folder, is_text
from pipeline.core.tables import SAMPLES
from pipeline.data.readers import first_malformed, read_rows, unreadable
from pipeline.model.base_model import context_length, load_tokenizer

ROLES = ("train", "validation", "test")
SPLIT_OFF = 0.1
"""Share of the train rows that becomes a validation or test split that was not given."""

LEAST_LEFT = 0.5
"""Share of the train rows that must be in no other split that was given; where fewer are, one file was taken for another."""

STAND_IN = "\ue000\uf8ff\ue000"
"""Stands for an answer: private signs of Unicode, which no template knows or strips."""

MAX_PROBLEM, MAX_PROBLEMS = 200, 10
"""Characters of a reason to pass a row over, and how many reasons are told apart."""

TOKENISED = pa.schema(
    [
        ("role", pa.string()),
        ("problem", pa.string()),
        ("place", pa.uint64()),
        *(field for field in SAMPLES if field.name != "split"),
    ]
)


@dataclass(frozen=True)
class Splits:
    """What a target gives: tables of schema SAMPLES, and how many rows were passed over for which reason."""

    search: pa.Table
    training: dict[str, pa.Table]
    counts: dict[str, dict[str, int]]


def take_samples(config: Config) -> Splits:
    """Read and tokenise a target's data through Ray Data and draw its splits.

    Raises:
        InputError: a file is missing, malformed or empty, or has no usable completion.
    """
    paths = target_paths(config)
    rows = _tokenised(paths, config)
    counts = {role: _counted(_of_role(rows, role)["problem"].fill_null("used").to_pylist()) for role in paths}
    usable = {role: _usable(rows, role, path, counts[role]) for role, path in paths.items()}
    training = _training_splits(_disjoint(usable, paths, counts), config)
    return Splits(_search_sample(training["train"], config, counts["train"]), training, counts)


def _counted(problems: list[str]) -> dict[str, int]:
    """How many rows were used, and how many passed over for which of the reasons that hold for most."""
    found = Counter(problems)
    kept = {name: found.pop(name) for name in ("used", "malformed") if name in found}
    common = dict(found.most_common(MAX_PROBLEMS))
    others = found.total() - sum(common.values())
    return kept | common | ({"other reasons": others} if others else {})


def target_paths(config: Config) -> dict[str, str]:
    """The target's data, by its role.

    Raises:
        InputError: there is nothing at a path.
    """
    paths = {role: path for role in ROLES if (path := getattr(config.target, role)) is not None}
    folders = {role: Folder.at(path) for role, path in paths.items()}
    for role, folder in folders.items():
        if not _exists(folder, role):
            raise InputError(f"{paths[role]}: no such file or folder (target.{role})")
        if not any(size for _, size, _ in folder.state()):
            raise InputError(f"{paths[role]}: the data set is empty, or no file (target.{role})")
    places = {role: folder.path for role, folder in folders.items() if not folder.exists("dataset_dict.json")}
    if twice := next((role for role in places if list(places.values()).count(places[role]) > 1), None):
        raise InputError(f"{paths[twice]}: the same data for two splits (target.{twice}); give each rows of its own")
    return paths


def _exists(folder: Folder, role: str) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        if may_pass(error):
            raise
        raise InputError(f"{folder.uri}: cannot be looked at (target.{role}; {one_line(error)})") from error


def split_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table["split"], split))


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
    last = max(place for place, flag in enumerate(inside) if flag)
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
    place = hashlib.sha256(f"{seed} {sample_id}".encode()).digest()[:8]
    return {"place": int.from_bytes(place, "little"), "sample_id": sample_id, **tokens}


def _tokenised(paths: dict[str, str], config: Config) -> pa.Table:
    """All rows of all files. One Ray Data execution reads them side by side."""
    load_tokenizer(config.base)  # an unknown base is the user's error, not a worker's
    longest = min(config.target.max_tokens, context_length(config.base) - 1)  # an engine generates a token behind a row
    options = {"base": config.base, "seed": config.search.seed, "max_tokens": longest}
    parts = [
        read_rows(path, role).map_batches(tokenise_batch, batch_format="pyarrow", fn_kwargs={"role": role, **options})
        for role, path in paths.items()
    ]
    rows = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    batches = rows.iter_batches(batch_format="pyarrow", batch_size=None)
    try:
        tables = [batch.select(TOKENISED.names).cast(TOKENISED) for batch in batches if batch.num_rows]
    except (OSError, pa.ArrowException) as error:
        if harmed := next(filter(None, map(unreadable, paths.values())), None):
            raise InputError(harmed) from error
        raise
    return pa.concat_tables(tables) if tables else TOKENISED.empty_table()


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
        raise ValueError(shown(f"the chat template refuses it: {error}", MAX_PROBLEM)) from error
    except Exception as error:  # templates are programs, and other fields of a message may be anything
        raise ValueError(f"the chat template fails ({type(error).__name__})") from error
    if not is_text(text):
        raise ValueError("a text that is not valid Unicode")
    return text


def _of_role(rows: pa.Table, role: str) -> pa.Table:
    return rows.filter(pc.equal(rows["role"], role))


def _usable(rows: pa.Table, role: str, path: str, counts: dict[str, int]) -> pa.Table:
    """A file's usable rows in the order of their places.

    Raises:
        InputError: a line is malformed, or no row can be used.
    """
    if counts.get("malformed"):
        raise InputError(f"{first_malformed(path)}; each line must be one JSON object, in UTF-8")
    if not counts:
        raise InputError(f"{path}: the data set is empty (target.{role})")
    usable = _of_role(rows, role).filter(pc.is_null(_of_role(rows, role)["problem"]))
    if not len(usable):
        reasons = ", ".join(f"{count} x {problem}" for problem, count in counts.items())
        raise InputError(f"{path}: no row can be used ({reasons}); rows need messages, or prompt and completion")
    return usable.sort_by([("place", "ascending")])


def _disjoint(usable: dict[str, pa.Table], paths: dict[str, str], counts: dict[str, dict[str, int]]) -> dict[str, pa.Table]:
    """The splits that were given, each content in one alone: what is in several stays in test, or else in validation, so that
    nothing is measured on what was trained on. What they lose is counted.

    Raises:
        InputError: too little is left of one.
    """
    kept: dict[str, pa.Table] = {}
    for role in [role for role in reversed(ROLES) if role in usable]:
        rows = usable[role]
        taken = pa.chunked_array([table["sample_id"].combine_chunks() for table in kept.values()], pa.string())
        left = rows.filter(pc.invert(pc.is_in(rows["sample_id"], taken.combine_chunks())))
        if lost := len(rows) - len(left):
            if len(left) < (LEAST_LEFT * len(rows) if role == "train" else 1):
                others = " or ".join(f"{paths[other]} (target.{other})" for other in kept)
                raise InputError(
                    f"{paths[role]}: {lost} of {len(rows)} usable rows (target.{role}) are also in {others}; "
                    "give each split rows of its own, or none: validation and test are then split off from train"
                )
            counts[role]["used"] -= lost
            counts[role][f"also in {' or '.join(kept)}"] = lost
        kept[role] = left
    return kept


def _training_splits(usable: dict[str, pa.Table], config: Config) -> dict[str, pa.Table]:
    """train, validation and test; those not given are split off from train, whose rows they then no longer are in."""
    target = config.target
    splits = dict(usable)
    limits = {"validation": target.validation_rows, "test": target.test_rows}
    absent = [role for role in limits if role not in usable]
    train = usable["train"]
    size = max(1, int(len(train) * SPLIT_OFF))
    for role in absent:
        splits[role] = train.slice(0, size)
        # Not slice(size): a content that is there several times stays on one side.
        train = train.filter(pc.invert(pc.is_in(train["sample_id"], splits[role]["sample_id"].combine_chunks())))
    if not len(train):
        rows = pc.count_distinct(usable["train"]["sample_id"]).as_py()
        raise InputError(
            f"{target.train}: {rows} distinct usable rows are too few to split {' and '.join(absent)} off; give more rows"
        )
    splits["train"] = train
    return {role: _as_samples(splits[role].slice(0, limits.get(role)), role) for role in ROLES}


def _search_sample(train: pa.Table, config: Config, counts: dict[str, int]) -> pa.Table:
    """The first rows of train in the order of their places, each content once; the last share is the hold-out."""
    _, first = np.unique(np.array(train["sample_id"]), return_index=True)
    counts["repeated (trained on, sampled once)"] = len(train) - len(first)
    drawn = train.take(np.sort(first)[: config.search.samples])
    holdout = max(1, round(len(drawn) * config.search.holdout))
    if len(drawn) <= holdout:
        raise InputError(f"{config.target.train}: {len(drawn)} distinct usable rows are too few to search with; give more rows")
    split = ["search"] * (len(drawn) - holdout) + ["holdout"] * holdout
    return drawn.set_column(drawn.column_names.index("split"), "split", pa.array(split))


def _as_samples(rows: pa.Table, split: str) -> pa.Table:
    return rows.append_column("split", pa.array([split] * len(rows), pa.string())).select(SAMPLES.names)
