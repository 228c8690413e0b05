"""Which adapters were trained on the target's own rows, as far as their cards tell: their scores say less than they seem to.

A card's front matter names data sets. One that is a JSONL file in the adapter's own folder on a disk is read, and its rows are
compared with the target's. What lies elsewhere is not fetched; there the name alone is compared with the target's path.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipeline.basemodel import load_tokenizer
from pipeline.cache import AdapterCache
from pipeline.errors import AdapterError
from pipeline.samples import tokenise_text

MAX_BYTES = 64 << 20
"""Of a data file; what comes after is not read."""

SHINGLE = 5
"""Tokens in a row: two rows are alike by how many such runs they share."""

NEAR = 0.8
"""Jaccard similarity of their shingles from which on two rows are near duplicates."""

Splits = dict[str, pa.Table]
"""Name of a split of the target -> its rows, with the columns sample_id and input_ids."""

Shingles = frozenset[tuple[int, ...]]


def find_contamination(catalogue: pa.Table, base: str, target: str, splits: Splits) -> dict[str, list[str]]:
    """adapter_id -> what its data has to do with the target's rows, in sentences; only where there is something to say.

    Args:
        catalogue: the valid adapters.
        target: path of the target's training data.
    """
    rows = [row for row in catalogue.to_pylist() if row["datasets"]]
    if not rows:
        return {}
    known = ray.put(splits)
    compare = ray.remote(compare_data).options(num_cpus=1)
    waiting = {row["adapter_id"]: compare.remote(row["uri"], row["datasets"], base, target, known) for row in rows}
    return {name: found for name, task in waiting.items() if (found := ray.get(task))}


def compare_data(uri: str, names: Sequence[str], base: str, target: str, splits: Splits) -> list[str]:
    """What the data sets that an adapter's card names have to do with the target's rows."""
    found = [f"its card names {name}, the target's own data set" for name in names if _same(name, target)]
    try:
        with closing(AdapterCache()) as cache, cache.lease(uri) as folder:
            for file in _files(folder, names):
                found += overlaps(file.name, list(_rows(file, base)), splits)
    except AdapterError:
        return found  # it is set aside where it is scored
    return found


def overlaps(name: str, rows: Sequence[dict[str, Any]], splits: Splits) -> list[str]:
    """How many rows of each split are among `rows` (columns sample_id and input_ids), or nearly.

    Near: the Jaccard similarity of the sets of SHINGLE tokens in a row is NEAR at least (Broder, 1997).
    """
    ids = {row["sample_id"] for row in rows}
    theirs = [_shingles(row["input_ids"]) for row in rows]
    places: dict[tuple[int, ...], list[int]] = {}
    for place, shingles in enumerate(theirs):
        for shingle in shingles:
            places.setdefault(shingle, []).append(place)
    found = []
    for split, table in splits.items():
        ours = list(zip(table["sample_id"].to_pylist(), table["input_ids"].to_pylist(), strict=True))
        exact = sum(sample in ids for sample, _ in ours)
        near = sum(_is_near(_shingles(tokens), theirs, places) for sample, tokens in ours if sample not in ids)
        if exact or near:
            found.append(f"its card names {name}, which holds {exact} of {len(ours)} {split} rows, and {near} others nearly")
    return found


def _is_near(shingles: Shingles, others: Sequence[Shingles], places: dict[tuple[int, ...], list[int]]) -> bool:
    # A near duplicate shares most shingles, hence the rarest of any few of them: one such list has it.
    few = sorted((places.get(shingle, []) for shingle in shingles), key=len)[: int((1 - NEAR) * len(shingles)) + 1]
    return any(len(shingles & others[place]) >= NEAR * len(shingles | others[place]) for one in few for place in one)


def _shingles(tokens: Sequence[int]) -> Shingles:
    return frozenset(tuple(tokens[start : start + SHINGLE]) for start in range(max(1, len(tokens) - SHINGLE + 1)))


def _same(name: str, target: str) -> bool:
    return name.rstrip("/") == target.rstrip("/")


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Those that are files of the adapter's own folder, links followed."""
    inside = folder.resolve()
    paths = [(folder / name).resolve() for name in names if name.isprintable()]
    return [path for path in paths if path.is_relative_to(inside) and path.suffix == ".jsonl" and path.is_file()]


def _rows(file: Path, base: str) -> Iterable[dict[str, Any]]:
    tokenizer = load_tokenizer(base)
    with file.open("rb") as lines:
        for line in lines.read(MAX_BYTES).split(b"\n"):
            row = tokenise_text(line, tokenizer, seed=0, max_tokens=1 << 16)
            if "problem" not in row:
                yield row
