"""Rows of like length in batches. In a module of its own, so that code which only deals out rows imports no transformers."""

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of rows, the longest first, in batches of at most `tokens` padded tokens (one row at least)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
