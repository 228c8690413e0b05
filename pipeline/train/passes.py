"""How many tokens a training pass has: on a GPU as many as its memory holds, by the measure of one small pass.

An 8B base saves some 6 MB of activations a token, a 135M one a tenth of a MB; cards have 24 to 140 GB. No fixed size suits them.
"""

import torch

from pipeline.core.errors import PassTooLargeError
from pipeline.model.base_model import device
from pipeline.model.completion_loss import Batch
from pipeline.train.arm import Job, pass_tokens
from pipeline.train.evaluate import Rows
from pipeline.train.worker_model import Trainable

MEASURED = 512
"""Padded tokens of the pass that is measured, or one row where the longest has more."""

SHARE = 0.85
"""Of the memory that is free beside weights, gradients and moments, what passes may take; the rest is for what does not fit
together."""

LEAST, MOST = 256, 16_384
"""Tokens that are chosen. Larger passes are no faster; a row that is longer than what is chosen has a pass of its own."""


def choose_tokens(job: Job, trainable: Trainable, rows: Rows) -> int:
    """Padded tokens in one forward and backward pass of this worker: what the config asks for, or what fits. Workers that share
    the weights out must all call it.

    Args:
        rows: some that are about as long as those trained on.

    Raises:
        PassTooLargeError: the small pass itself ran out of memory where others wait for this worker's part of the model.
    """
    on_gpu = device().type == "cuda"
    if job.train.tokens_per_pass != "auto" or not on_gpu:
        return pass_tokens(job.train, on_gpu)
    try:
        a_token = _measure(trainable, rows.widest(MEASURED))
        return min(MOST, max(LEAST, int(SHARE * _free(trainable) / a_token)))
    except torch.OutOfMemoryError as error:
        if job.train.shard:
            raise PassTooLargeError([LEAST]) from error
        return LEAST
    finally:
        for weight in trainable.weights:
            weight.grad = None


def _measure(trainable: Trainable, batch: Batch) -> float:
    """Bytes that a forward and backward pass takes a token at its peak."""
    before = peak = 0
    for _ in range(2):  # the first allocates besides what stays: gradients, and what libraries keep
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainable.loss(batch).backward()
        peak = torch.cuda.max_memory_allocated()
    return (peak - before) / batch.ids_BT.numel()


def _free(trainable: Trainable) -> int:
    """Bytes of the GPU for passes, while gradients are held: what nobody has and what the allocator keeps unused, less Adam's
    moments, which come with the first step."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused - trainable.moment_bytes()
