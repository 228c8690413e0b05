"""A table that is one Parquet file of a folder, or a folder of them, its parts: read a row group at a time, never as a whole.

Rows are numbered through all parts, in the order of the parts' names.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.storage import Folder

FOOTERS_AT_ONCE = 16
"""Parts whose footers are read side by side."""

ROW_GROUP_BYTES = 1 << 20
"""Of a row group in memory: what is read for the sake of one row."""


class Parts:
    """A table by its row groups; of them no more is kept than how many rows each has."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder = folder
        self.files = part_names(folder, name)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
            sizes = list(threads.map(self._group_sizes, self.files))
        self._starts = np.cumsum([0, *(rows for part in sizes for rows in part)])
        self._groups = [(file, group) for file, part in zip(self.files, sizes, strict=True) for group in range(len(part))]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows, a row group at a time."""
        yield from self._read(range(len(self._groups)), columns)

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of these numbers, which rise: each row group that holds some is read once."""
        groups = np.unique(np.searchsorted(self._starts, numbers, side="right") - 1)
        for group, rows in zip(groups, self._read(groups.tolist(), columns), strict=True):
            first, last = np.searchsorted(numbers, self._starts[[group, group + 1]])
            yield rows.take(pa.array(numbers[first:last] - self._starts[group]))

    def _read(self, groups: Iterable[int], columns: Sequence[str]) -> Iterator[pa.Table]:
        for file, some in groupby((self._groups[group] for group in groups), key=lambda group: group[0]):
            with pq.ParquetFile(self._folder.join(file), filesystem=self._folder.files, pre_buffer=True) as part:
                for _, group in some:
                    yield part.read_row_group(group, columns=list(columns))

    def _group_sizes(self, file: str) -> list[int]:
        footer = pq.read_metadata(self._folder.join(file), filesystem=self._folder.files)
        return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def part_names(folder: Folder, name: str) -> list[str]:
    """The files of a table: itself, or where it is a folder those in it, in their order."""
    table = folder.sub(name)
    return [f"{name}/{file}" for file in table.list_files(".parquet")] if table.is_folder else [name]


def write_part(folder: Folder, name: str, rows: pa.Table) -> None:
    """Write a part in small row groups."""
    size = max(1, rows.nbytes // max(1, len(rows)))
    folder.write_table(name, rows, row_group_rows=max(1, ROW_GROUP_BYTES // size))
