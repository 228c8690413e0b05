"""Validation and test metrics of a causal LM, teacher-forced."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from pipeline.adapters.adapter import put_on
from pipeline.adapters.fetch import fetch_adapter
from pipeline.core.file_names import CONFIG_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.model.base_model import device, fast_dtype, load_model
from pipeline.model.completion_loss import Batch, collate, copied_to, score_tokens
from pipeline.train.arm import download_model
from pipeline.train.batches import share_out

EVALUATION_TOKENS = 2048
"""Padded tokens in one forward pass of an evaluation."""


class Rows:
    """A split in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[list[int]] = table["input_ids"].to_pylist()
        self.completion: list[list[bool]] = table["completion_mask"].to_pylist()
        self.learn: list[list[bool]] = table["learn_mask"].to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with what is learned of them."""
        return collate([self.ids[row] for row in rows], [self.learn[row] for row in rows], device())

    def counted(self, rows: Sequence[int]) -> Tensor:
        """Which of the tokens that count in `batch` are of the completion; bool, shape (N,)."""
        pairs = (zip(self.learn[row][1:], self.completion[row][1:], strict=True) for row in rows)
        inside = [counts for row in pairs for learned, counts in row if learned]
        return copied_to(device(), torch.tensor(inside, dtype=torch.bool))

    def widest(self, tokens: int) -> Batch:
        """The longest row as often as it fits into so many tokens, once at least; every token counts."""
        row = max(self.ids, key=len)
        copies = max(1, tokens // len(row))
        return collate([row] * copies, [[True] * len(row)] * copies, device())


def causal(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


Score = Callable[[Batch], tuple[Tensor, Tensor]]
"""What `score_tokens` gives, of some model."""


def in_batches(
    score: Score, batch_of: Callable[[Sequence[int]], Batch], places: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], Batch, Tensor, Tensor]]:
    """One worker's share of some rows, a batch at a time: their places, the batch, and what `score` gives of it."""
    for chosen in places:
        if chosen:
            batch = batch_of(chosen)
            yield chosen, batch, *score(batch)
        else:
            score(collate([[0, 0]], [[False, False]], device()))  # the others wait for this worker's part of the model


def evaluate(score: Score, rows: Rows, rank: int = 0, workers: int = 1) -> Tensor:
    """Sums over one worker's share of the rows: NLL and number of completion tokens, how many were first choice, rows, exact
    matches, and answer matches.

    A row matches exactly if every token of its completion and its end of turn is the model's first choice given the true
    tokens before it. Greedy decoding then writes exactly these tokens, and otherwise leaves them at the first miss. Of an answer
    match the end of turn is no part.

    Returns:
        float64, shape (6,).
    """
    sums = torch.zeros(6, dtype=torch.float64, device=device())  # on the device until all is done: to read is to wait for it
    places = share_out([len(ids) for ids in rows.ids], workers, EVALUATION_TOKENS)[rank]
    for chosen, batch, nll_N, hit_N in in_batches(score, rows.batch, places):
        counted_N = rows.counted(chosen)
        misses_B, missed_B = (_count(batch, missed_N) for missed_N in (~hit_N, ~hit_N & counted_N))
        sums[:3] += torch.stack([torch.where(counted_N, nll_N, 0.0).sum(), counted_N.sum(), (hit_N & counted_N).sum()])
        sums[3] += len(chosen)
        sums[4] += (misses_B == 0).sum()
        sums[5] += (missed_B == 0).sum()
    return sums.cpu()


def _count(batch: Batch, counted_N: Tensor) -> Tensor:
    """How many tokens of each row; shape (B,)."""
    return torch.zeros(len(batch.ids_BT), device=counted_N.device).index_add(0, batch.row_N, counted_N.float())


def as_metrics(sums: Tensor) -> dict[str, float]:
    """NLL (infinite where it is NaN) and accuracy a completion token, and the share of rows that match exactly and but for the
    end of turn, from the sums of `evaluate`."""
    nll, tokens, hits, rows, exact, answers = sums.tolist()
    return {
        "eval_nll": nll / tokens if math.isfinite(nll) else math.inf,
        "eval_token_accuracy": hits / tokens,
        "eval_exact_match": exact / rows,
        "eval_answer_match": answers / rows,
    }


def sum_over_workers(values: Tensor, workers: int) -> Tensor:
    """What the workers of one training run have together; all of them must call it."""
    if workers == 1:
        return values
    shared = values.to(device())
    dist.all_reduce(shared)
    return shared.cpu()


def least_over_workers(value: int, workers: int) -> int:
    """The least that a worker of one training run has; all of them must call it."""
    if workers == 1:
        return value
    shared = torch.tensor(value, device=device())
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)


def on_test(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics by the names that they have on the test split."""
    return {key.replace("eval_", "test_"): value for key, value in metrics.items()}


def evaluate_on_test(base: str, dtype: str, data: Folder, checkpoint: Folder) -> dict[str, float]:
    """Metrics of a checkpoint on the test split."""
    model = load_checkpoint(base, fast_dtype(dtype), checkpoint)
    return on_test(as_metrics(evaluate(partial(score_tokens, model), Rows(data.read_table("test.parquet")))))


def load_checkpoint(base: str, dtype: torch.dtype, checkpoint: Folder) -> Any:
    """What an arm left, in evaluation mode: a whole model, or the base with an adapter."""
    with temporary_folder() as cache:
        if checkpoint.exists(CONFIG_FILE):
            return causal(put_on(load_model(base, dtype), fetch_adapter(checkpoint.uri, cache), base).eval())
        download_model(checkpoint, cache)
        return load_model(str(cache), dtype)
