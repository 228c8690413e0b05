"""What trained weights answer to the rows of the test split: the likeliest of a row's choices, or what they write.

To write is to decode greedily from the prompt of a row's last answer, until the end of the turn or so many tokens as `longest`
says. The end of the turn is the token that follows the answers in the rows, as training learns it, or the tokenizer's. Rows
are written to in batches where that leaves what is written as it is, else one by one.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.config import BY_CHOICES, HARNESS
from pipeline.core.storage import Folder
from pipeline.core.tables import ANSWERS
from pipeline.model.base_model import device, fast_dtype, load_tokenizer
from pipeline.model.completion_loss import Batch, collate, may_share_batches, score_tokens
from pipeline.train.batches import share_out
from pipeline.train.evaluate import EVALUATION_TOKENS, Score, in_batches, load_checkpoint, sum_over_workers
from pipeline.train.harness import answer_task

GENERATION_TOKENS = 8192
"""Tokens of prompts and answers, padding included, that are kept at a time."""

LEAST_WRITTEN = 32
"""Tokens that an answer may have at least, however short the references are."""


class Asked(NamedTuple):
    """Token ids of a row: up to its last answer, of this answer, and of the end of its turn, if there is one."""

    prompt: list[int]
    answer: list[int]
    end: list[int]


def asked(rows: pa.Table) -> list[Asked]:
    """What is asked in each row, schema SAMPLES, and what the right answer is."""
    columns = (rows[name].to_pylist() for name in ("input_ids", "completion_mask", "learn_mask"))
    return [_asked(*row) for row in zip(*columns, strict=True)]


def texts_of(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Prompts and references of rows, schema SAMPLES, without special tokens and blanks around them."""
    found = asked(rows)
    return [_text(one.prompt, tokenizer) for one in found], [_text(one.answer, tokenizer) for one in found]


def answers_on_test(base: str, dtype: str, data: Folder, checkpoint: Folder, metric: str) -> pa.Table:
    """What a checkpoint answers on the test split, or to a task of lm-eval; schema ANSWERS."""
    model, tokenizer = load_checkpoint(base, fast_dtype(dtype), checkpoint), load_tokenizer(base)
    if metric.startswith(HARNESS):
        return answer_task(model, tokenizer, metric)
    rows = data.read_table("test.parquet")
    if metric in BY_CHOICES:
        return choose(partial(score_tokens, model), rows, tokenizer, metric)
    return _table(rows, tokenizer, write(model, asked(rows), tokenizer), None)


def choose(
    score: Score, rows: pa.Table, tokenizer: PreTrainedTokenizerBase, metric: str, rank: int = 0, workers: int = 1
) -> pa.Table:
    """Of each row, schema TEST, the choice of the highest log-likelihood given the prompt, summed over its tokens or with the
    metric `choices_per_token` their mean; it scores 1 if its tokens are the row's own, else 0. Schema ANSWERS.

    The end of the turn does not count. All workers must call it, and all get the whole table.
    """
    choices = rows["choices"].to_pylist()
    flat = [choice for row in choices for choice in row]
    places = _share_of_choices([[len(choice["input_ids"]) for choice in row] for row in choices], rank, workers)
    nll_C = sum_over_workers(_nll_of_choices(score, flat, places), workers)
    if metric == "choices_per_token":
        nll_C = nll_C / torch.tensor([_tokens_counted(choice) for choice in flat])
    best = [row[int(nll.argmin())] for row, nll in zip(choices, nll_C.split([len(row) for row in choices]), strict=True)]
    texts = [_text(_answer(choice), tokenizer) for choice in best]
    own = rows["input_ids"].to_pylist()
    right = [float(choice["input_ids"] == ids) for choice, ids in zip(best, own, strict=True)]
    return _table(rows, tokenizer, texts, right)


def write(model: Any, rows: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a transformers model writes by greedy decoding to each row, without special tokens and blanks around it."""
    model.generation_config = GenerationConfig()  # the base's own may ask for draws and penalties
    stops, room = _stops(rows, tokenizer), longest(rows)
    found: list[list[int]] = [[]] * len(rows)
    tokens = GENERATION_TOKENS if may_share_batches(model) else 1
    sizes = [len(row.prompt) + room for row in rows]  # who has less room than others has it alone
    for places in share_out([size if size <= _most(model) else GENERATION_TOKENS for size in sizes], 1, tokens)[0]:
        for place, ids in zip(places, _written(model, [rows[p].prompt for p in places], stops, room), strict=True):
            found[place] = ids
    return [_text(ids, tokenizer) for ids in found]


def longest(rows: Sequence[Asked]) -> int:
    """Tokens that an answer may have: twice those of the longest right one, LEAST_WRITTEN at least."""
    return max(LEAST_WRITTEN, *(2 * len(row.answer) for row in rows))


def _asked(ids: list[int], completion: list[bool], learn: list[bool]) -> Asked:
    """An answer and the end of its turn are learned without a gap, and something that is not learned is before them."""
    last = max(place for place, inside in enumerate(completion) if inside)
    start = max((place for place, inside in enumerate(learn[:last]) if not inside), default=-1) + 1
    return Asked(ids[:start], ids[start : last + 1], ids[last + 1 :])


def _answer(choice: dict[str, list[Any]]) -> list[int]:
    return [token for token, inside in zip(choice["input_ids"], choice["completion_mask"], strict=True) if inside]


def _tokens_counted(choice: dict[str, list[Any]]) -> int:
    return sum(choice["completion_mask"][1:])  # a row's first token has nothing before it


def _share_of_choices(lengths: Sequence[Sequence[int]], rank: int, workers: int) -> list[list[int]]:
    """One worker's share of all choices, in batches of a row's own: their prompt is then computed once. Each worker has as many
    batches as any other; who runs out has empty ones.

    Args:
        lengths: of each row the tokens of each choice.
    """
    firsts = accumulate(map(len, lengths), initial=0)
    by_row = ((first, share_out(row, 1, EVALUATION_TOKENS)[0]) for first, row in zip(firsts, lengths, strict=False))
    batches = [[first + place for place in batch] for first, found in by_row for batch in found]
    return [batches[n] if n < len(batches) else [] for n in range(rank, -(-len(batches) // workers) * workers, workers)]


def _nll_of_choices(score: Score, choices: Sequence[dict[str, list[Any]]], share: Sequence[Sequence[int]]) -> Tensor:
    """Summed NLL of the answers in a worker's share; those of others are zero. float64, shape (C,)."""

    def batch_of(places: Sequence[int]) -> Batch:
        given = [choices[place] for place in places]
        return collate([one["input_ids"] for one in given], [one["completion_mask"] for one in given], device())

    nll_C = torch.zeros(len(choices), dtype=torch.float64, device=device())
    for places, batch, nll_N, _ in in_batches(score, batch_of, share):
        nll_C[list(places)] = torch.zeros(len(places), dtype=torch.float64, device=device()).index_add(0, batch.row_N, nll_N)
    return nll_C.cpu()


def _stops(rows: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: what follows the answers, but for what is also within one, as a line end may be."""
    ends = {token for row in rows for token in row.end} | {tokenizer.eos_token_id}
    return sorted(ends - {None} - {token for row in rows for token in row.answer})


@torch.no_grad()
def _written(model: Any, prompts: Sequence[list[int]], stops: Sequence[int], room: int) -> Iterable[list[int]]:
    """Token ids behind each prompt, up to the first that ends an answer."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    seen_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=seen_BT.to(model.device),
        max_new_tokens=min(room, _most(model) - width),
        do_sample=False,
        eos_token_id=[*stops] or None,
        pad_token_id=stops[0] if stops else 0,
    )
    for ids in written_BT[:, width:].tolist():
        yield ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def _most(model: Any) -> int:
    """Tokens that a base knows positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _table(rows: pa.Table, tokenizer: PreTrainedTokenizerBase, answers: list[str], scores: list[float] | None) -> pa.Table:
    prompts, references = texts_of(rows, tokenizer)
    columns = [rows["sample_id"], prompts, references, answers, scores or pa.nulls(len(rows), pa.float64())]
    return pa.table(columns, names=ANSWERS.names).cast(ANSWERS)
