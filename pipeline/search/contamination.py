"""Which adapters were trained on the target's own rows, as far as their cards tell: their scores say less than they seem to.

A card's front matter names data sets. One that is a JSONL file in the adapter's own folder on a disk is read, and its rows are
compared with the target's. What lies elsewhere is neither fetched nor asked for, and its adapter is not either; there the name
alone is compared with the target's path.

The files are strangers': of them no more is read than MAX_BYTES, and no more kept than what the target's rows have too.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from pipeline.core.errors import AdapterError, one_line
from pipeline.data.tokenise import Reading, tokenise_text
from pipeline.model.base_model import load_tokenizer

MAX_BYTES = 4 << 20
"""Of an adapter's data files together; what comes after is not read."""

MAX_LINE = 256 << 10
"""Bytes of a line; a longer one is passed over."""

READING = Reading(max_tokens=1 << 16)

LINES, PARQUET = (".jsonl", ".json"), ".parquet"

SHINGLE = 5
"""Tokens in a row: two rows are alike by how many such runs they share."""

NEAR = 0.8
"""Jaccard similarity of their shingles from which on two rows are near duplicates."""

Splits = dict[str, pa.Table]
"""Name of a split of the target -> its rows, with the columns sample_id and input_ids."""

Shingles = frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Ours:
    """The target's rows, as others are compared with them."""

    splits: dict[str, list[tuple[str, Shingles]]]
    """sample_id and shingles of each row of a split."""
    shingles: Shingles
    """Of all rows."""

    @classmethod
    def of(cls, splits: Splits) -> "Ours":
        rows = {
            name: [
                (row["sample_id"], _shingles(row["input_ids"])) for row in table.select(["sample_id", "input_ids"]).to_pylist()
            ]
            for name, table in splits.items()
        }
        return cls(rows, Shingles().union(*(shingles for part in rows.values() for _, shingles in part)))


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
    return {name: found for name, task in waiting.items() if (found := _outcome(task))}


def compare_data(uri: str, names: Sequence[str], base: str, target: str, splits: Splits) -> list[str]:
    """What the data sets that an adapter's card names have to do with the target's rows."""
    names = list(dict.fromkeys(names))
    found = [f"its card names {name}, the target's own data set" for name in names if _same(name, target)]
    files = [] if "://" in uri else _files(Path(uri), names)
    return [*found, *_compare_files(files, base, Ours.of(splits))] if files else found


def overlaps(name: str, rows: Iterable[dict[str, Any]], ours: Ours) -> list[str]:
    """How many rows of each split are among `rows` (columns sample_id and input_ids), or nearly.

    Near: the Jaccard similarity of the sets of SHINGLE tokens in a row is NEAR at least (Broder, 1997). Of another row it takes
    the shingles that ours have too, and how many there are; of many copies that differ elsewhere this is the same.
    """
    ids: set[str] = set()
    distinct: set[tuple[Shingles, int]] = set()
    for row in rows:
        ids.add(row["sample_id"])
        shingles = _shingles(row["input_ids"])
        shared = shingles & ours.shingles
        if len(shared) >= NEAR * len(shingles):  # or it is near to none
            distinct.add((shared, len(shingles)))
    others = list(distinct)
    holders: dict[tuple[int, ...], list[int]] = {}
    for i, (shared, _) in enumerate(others):
        for shingle in shared:
            holders.setdefault(shingle, []).append(i)
    found = []
    for split, part in ours.splits.items():
        exact = sum(sample in ids for sample, _ in part)
        near = sum(_is_near(shingles, others, holders) for sample, shingles in part if sample not in ids)
        if exact or near:
            found.append(f"its card names {name}, which holds {exact} of {len(part)} {split} rows, and {near} others nearly")
    return found


def _outcome(task: ray.ObjectRef) -> list[str]:
    try:
        return ray.get(task)
    except RayError as error:  # what one adapter's files do to its task must not stop the search
        return [str(AdapterError(f"its data cannot be compared with the target's rows ({one_line(error)})"))]


def _compare_files(files: Iterable[Path], base: str, ours: Ours) -> Iterator[str]:
    left = MAX_BYTES
    for file in files:
        size = file.stat().st_size
        if file.suffix.lower() == PARQUET:
            yield f"its card names {file.name}, which is Parquet and not looked at"
            continue
        yield from overlaps(file.name, _rows(file, base, left), ours)
        if size > left:
            limit = f"{MAX_BYTES >> 20} MB of an adapter's data are"
            yield f"its card names {file.name}, of which {size - left} bytes are not looked at; {limit}"
        left = max(0, left - size)


def _is_near(shingles: Shingles, others: Sequence[tuple[Shingles, int]], holders: dict[tuple[int, ...], list[int]]) -> bool:
    # A near duplicate shares most shingles, hence the rarest of any few of them: one such list has it.
    few = sorted((holders.get(shingle, []) for shingle in shingles), key=len)[: int((1 - NEAR) * len(shingles)) + 1]
    return any(_are_near(shingles, *others[i]) for i in set().union(*few))


def _are_near(shingles: Shingles, shared: Shingles, size: int) -> bool:
    both = len(shingles & shared)
    return both >= NEAR * (len(shingles) + size - both)


def _shingles(tokens: Sequence[int]) -> Shingles:
    return frozenset(tuple(tokens[start : start + SHINGLE]) for start in range(max(1, len(tokens) - SHINGLE + 1)))


def _same(name: str, target: str) -> bool:
    """Whether two paths are the same, or two ids on the Hub, which knows no case."""
    name, target = name.rstrip("/"), target.rstrip("/")
    return name == target or (name.count("/") == 1 and name.lower() == target.lower())


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Those that are files of the adapter's own folder, links followed, each once however it is spelled."""
    inside = os.path.realpath(folder)
    paths = dict.fromkeys(Path(os.path.realpath(folder / name)) for name in names if name.isprintable())
    known = [path for path in paths if path.is_relative_to(inside) and path.suffix.lower() in (*LINES, PARQUET)]
    return [path for path in known if os.path.isfile(path)]  # pathlib raises where a name is too long


def _rows(file: Path, base: str, limit: int) -> Iterator[dict[str, Any]]:
    tokenizer = load_tokenizer(base)
    with file.open("rb") as lines:
        for line in dict.fromkeys(lines.read(limit).split(b"\n")):  # the same line again says nothing new
            row = tokenise_text(line, tokenizer, 0, READING) if len(line) <= MAX_LINE else {"problem": "too long"}
            if "problem" not in row:
                yield row
