"""The draw: which of a target's rows are in which split, from the hashes in their shards (`shards.py`) alone; and its parts.

Which rows are drawn depends on their content and the seed alone, not on their order or on how the files are split: each row has
a draw key, the hash of seed and content, and the draw takes the lowest keys. Rows of one content have one key, so that each range
of keys is handled by itself: tasks take some ranges each, and the driver adds up their counts.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.config import ROLES
from pipeline.core.parts import part_names, write_part
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES, TEST
from pipeline.data.shards import RANGES, read_pieces

PART_BYTES = 16 << 20
"""Of a part in memory, about; more where RANGES parts are too few for that."""


class Found(NamedTuple):
    """Rows of a role: all that are usable, those that no later role has too, and how many contents these are."""

    usable: int
    kept: int
    contents: int


class Cut(NamedTuple):
    """A split: of a role's kept rows, in the order of their keys, those from `start` to before `stop`."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Shards:
    """All shards of a target; `reports` is of schema SHARDS."""

    folder: Folder
    reports: pa.Table

    def hashes(self, role: str, ranges: tuple[int, int]) -> pa.Table:
        """Those of the role's rows that no later role has, in some ranges of keys."""
        return self._kept("hashes", role, ranges)

    def rows(self, role: str, ranges: tuple[int, int]) -> pa.Table:
        return self._kept("rows", role, ranges)

    def count(self, ranges: tuple[int, int]) -> dict[str, Found]:
        """What there is of each role in some ranges."""
        return {role: self._count(role, ranges) for role in ROLES if role in pc.unique(self.reports["role"]).to_pylist()}

    def _count(self, role: str, ranges: tuple[int, int]) -> Found:
        kept = self.hashes(role, ranges)["sample_id"]
        usable = pc.list_slice(self._of(role)["counts"], *ranges)
        return Found(pc.sum(pc.list_flatten(usable)).as_py() or 0, len(kept), pc.count_distinct(kept).as_py())

    def _kept(self, kind: str, role: str, ranges: tuple[int, int]) -> pa.Table:
        found = read_pieces(self.folder, self._of(role), kind, *ranges)
        for later in ROLES[ROLES.index(role) + 1 :]:
            taken = read_pieces(self.folder, self._of(later), "hashes", *ranges)["sample_id"]
            found = found.filter(pc.invert(pc.is_in(found["sample_id"], taken.combine_chunks())))
        return found

    def _of(self, role: str) -> pa.Table:
        return self.reports.filter(pc.equal(self.reports["role"], role))


class Draw:
    """The rows of all roles in the order of their keys, as counts of rows by ranges."""

    def __init__(self, shards: Shards) -> None:
        width = RANGES // _parts(pc.sum(shards.reports["bytes"]).as_py() or 0)
        self._ranges = [(start, start + width) for start in range(0, RANGES, width)]
        self._shards, count = ray.put(shards), ray.remote(num_cpus=1)(Shards.count)
        self._found = ray.get([count.remote(self._shards, ranges) for ranges in self._ranges])

    def total(self, role: str) -> Found:
        return Found(*(sum(counts) for counts in zip(*(found[role] for found in self._found), strict=True)))

    def whole_contents(self, role: str, stop: int) -> tuple[int, int]:
        """The number of the first kept row from `stop` on that is of another content than the one before, and how many contents
        the rows before it are."""
        ends = self._ends(role)
        part = int(np.searchsorted(ends, stop))  # with the row before `stop`
        before = int(ends[part - 1]) if part else 0
        task = ray.remote(num_cpus=1)(_whole_contents)
        rows, contents = ray.get(task.remote(self._shards, role, self._ranges[part], stop - before))
        return before + rows, contents + sum(found[role].contents for found in self._found[:part])

    def write(self, cuts: dict[str, Cut], data: Folder, check: Callable[[], None]) -> None:
        """Write the splits as `<name>.parquet/<part>.parquet`, schema SAMPLES, that of test TEST. Before each part `check`
        is called, by the task that writes it: it raises where another process may write by now."""
        check()
        attempt, write = uuid.uuid4().hex[:8], ray.remote(num_cpus=1)(_write_part)
        tasks = [
            write.remote(self._shards, name, cut.role, self._ranges[part], inside, data, f"{part:05d}-{attempt}", check)
            for name, cut in cuts.items()
            for part, inside in enumerate(self._inside(cut))
            if inside[0] < inside[1]
        ]
        ray.get(tasks)
        check()
        for name in cuts:  # a task of an attempt that was given up may have come to its end since
            for file in part_names(data, f"{name}.parquet"):
                if not file.endswith(f"-{attempt}.parquet"):
                    data.delete(file)

    def _ends(self, role: str) -> np.ndarray:
        return np.cumsum([found[role].kept for found in self._found])

    def _inside(self, cut: Cut) -> list[tuple[int, int]]:
        """Of each part's rows the first that is in a split, and the one after the last."""
        ends = self._ends(cut.role).tolist()
        starts = [0, *ends[:-1]]
        return [(max(cut.start, start) - start, min(cut.stop, end) - start) for start, end in zip(starts, ends, strict=True)]


def _parts(n_bytes: int) -> int:
    """A power of two, as RANGES is."""
    parts = 1
    while parts < RANGES and parts * PART_BYTES < n_bytes:
        parts *= 2
    return parts


def _whole_contents(shards: Shards, role: str, ranges: tuple[int, int], stop: int) -> tuple[int, int]:
    ids = shards.hashes(role, ranges)["sample_id"].to_numpy()
    last = stop
    while last < len(ids) and ids[last] == ids[stop - 1]:
        last += 1
    return last, len(np.unique(ids[:last].astype(str)))


def _write_part(
    shards: Shards,
    name: str,
    role: str,
    ranges: tuple[int, int],
    inside: Sequence[int],
    data: Folder,
    file: str,
    check: Callable[[], None],
) -> None:
    start, stop = inside
    rows = shards.rows(role, ranges).slice(start, stop - start)
    split = pa.array([name] * len(rows), pa.string())
    columns = (TEST if name == "test" else SAMPLES).names
    check()
    write_part(data, f"{name}.parquet/{file}.parquet", rows.append_column("split", split).select(columns))
