"""The machine's peak at what models mostly do: large matrix products."""

import time

import torch

from pipeline.model.base_model import fast_dtype


def gemm_peak(size: int = 4096) -> float:
    """FLOP/s of a large matrix product with the threads of this process, the best of five."""
    matrix = torch.randn(size, size).to(fast_dtype("auto"))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
