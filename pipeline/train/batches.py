"""Which rows a training step takes, and how the workers share them out. Pure functions of seed and step, so that a run which
resumes, or has another number of workers, goes on with the same rows in the same order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.model.length_batches import length_batches

ROW = pa.struct([("ids", pa.list_(pa.int32())), ("learn", pa.list_(pa.bool_()))])

STEP = pa.schema(
    [
        ("number", pa.int64()),  # of the step, counted from 0
        ("n_learned", pa.int64()),  # tokens whose loss counts, of all workers
        ("n_padded", pa.int64()),  # input tokens with padding, of all workers
        ("passes", pa.list_(pa.list_(ROW))),  # what this worker computes, one forward and backward pass each
    ]
)


@dataclass(frozen=True)
class Share:
    """What tells a worker's share of every step."""

    batch_size: int
    """Rows of a step over all workers."""
    seed: int
    rank: int
    workers: int
    tokens: int
    """Padded tokens in one forward and backward pass; a longer row has a pass of its own."""


def row_numbers(first: int, end: int, batch_size: int, n_rows: int, seed: int) -> np.ndarray:
    """Rows of the global batches of the steps from `first` to before `end`, one batch after the other: each epoch is a
    permutation of its own, drawn from the seed."""
    start, stop = first * batch_size, end * batch_size
    parts = [
        _permutation(seed, epoch, n_rows)[max(0, start - epoch * n_rows) : stop - epoch * n_rows].copy()
        for epoch in range(start // n_rows, -(-stop // n_rows))
    ]
    return np.concatenate(parts) if parts else np.array([], np.int32)


def share_out(lengths: Sequence[int], workers: int, tokens: int) -> list[list[list[int]]]:
    """Which rows of a global batch, by their index in it, are in which pass, for each worker.

    Rows of like length share a pass, so that little is padding and memory is that of one pass. Workers get rows of all
    lengths, and as many passes each, as a collective operation waits for all of them: who runs out has empty ones.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    shares = []
    for rank in range(workers):
        own = longest_first[rank::workers]
        shares.append([[own[p] for p in batch] for batch in length_batches([lengths[p] for p in own], tokens)])
    most = max(len(share) for share in shares)
    return [share + [[]] * (most - len(share)) for share in shares]


def padded_tokens(lengths: Sequence[int], workers: int, tokens: int) -> int:
    """Input tokens, padding included, that all workers together compute of a global batch."""
    return _padded(lengths, share_out(lengths, workers, tokens))


def make_step(rows: pa.Table, number: int, share: Share) -> dict[str, Any]:
    """One worker's share of a step, schema STEP. An empty pass has one row of two tokens of which none is learned.

    Args:
        rows: those of the global batch, in its order, with the columns input_ids and learn_mask.
    """
    lengths = pc.list_value_length(rows["input_ids"]).to_pylist()
    given = [{"ids": row["input_ids"], "learn": row["learn_mask"]} for row in rows.to_pylist()]
    nothing = {"ids": given[0]["ids"][:2], "learn": [False, False]}
    shares = share_out(lengths, share.workers, share.tokens)
    return {
        "number": number,
        "n_learned": sum(sum(row["learn"][1:]) for row in given),  # a row's first token has nothing before it
        "n_padded": _padded(lengths, shares),
        "passes": [[given[index] for index in batch] or [nothing] for batch in shares[share.rank]],
    }


def halved(passes: Sequence[Sequence[dict[str, Any]]]) -> int:
    """Padded tokens a pass with which the largest of these passes, as a step has them, would take half as many; 0: none has more
    than one row."""
    sizes = (len(rows) * max(len(row["ids"]) for row in rows) for rows in passes if len(rows) > 1)
    return max(sizes, default=0) // 2


def _padded(lengths: Sequence[int], shares: Sequence[Sequence[Sequence[int]]]) -> int:
    """A pass is as wide as its first row, which is its longest."""
    return sum(len(batch) * lengths[batch[0]] for share in shares for batch in share if batch)


def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """That of `Generator.permutation`, in half its memory."""
    numbers = np.arange(n_rows, dtype=np.int32 if n_rows <= np.iinfo(np.int32).max else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(numbers)
    return numbers
