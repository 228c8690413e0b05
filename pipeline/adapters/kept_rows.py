"""Rows of adapters that were checked before, for whoever indexes the same base next: `<folder>/*.parquet`.

A row holds for where an adapter is and for the state of its files (`pool.Listed.state`); the folder is that of one base and one
version of the checks. It says what was found in the adapter itself: what follows from the rest of the pool is found anew by
`catalogue.compare`, from rows old and new alike.

While an index works, each of its tasks adds a file for every few adapters, so that a kill costs no more than these. At the end
they and what was there become one file. Each is written whole, under a name of its own, and removed only once another one holds
its rows, so that those who index at the same time cannot harm each other.
"""

import secrets
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.adapters.pool import Listed
from pipeline.core.storage import Folder
from pipeline.core.tables import INSPECTED

KEPT = pa.schema([*INSPECTED, ("salt", pa.int64())])
"""`state`: null where the row is good for one index alone. `salt`: of the sketch; those of two are not compared."""

AT_ONCE = 32
"""Files that are read or removed at the same time."""


@dataclass(frozen=True)
class Blocks:
    """Where the tasks of one index put their rows as they find them."""

    folder: Folder
    index: str
    """Begins the names of the files."""

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep those of rows of schema KEPT that hold for a state of their files."""
        if kept := [row for row in rows if row["state"]]:
            self.folder.write_table(f"{self.index}-{uuid.uuid4().hex}.parquet", pa.Table.from_pylist(kept, schema=KEPT))


class KeptRows:
    """What earlier indexes have left in a folder, and what this one leaves."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._names = folder, folder.list_files(".parquet")
        self.blocks = Blocks(folder, uuid.uuid4().hex)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = pa.concat_tables([KEPT.empty_table(), *threads.map(self._read, self._names)])
        salts = pc.mode(found["salt"])  # two who were the first at the same time have one each
        self.salt: int = salts[0]["mode"].as_py() if len(salts) else secrets.randbits(62)
        self._known = found.filter(pc.equal(found["salt"], self.salt))

    def of(self, listed: Sequence[Listed]) -> pa.Table:
        """The rows, of schema KEPT, of those adapters that are as they were."""
        states = zip(self._known["uri"].to_pylist(), self._known["state"].to_pylist(), strict=True)
        places = {state: place for place, state in enumerate(states)}
        same = [one for one in listed if one.problem is None and (one.uri, one.state) in places]
        rows = self._known.take(pa.array([places[one.uri, one.state] for one in same], pa.int64()))
        # A pool above or below calls them otherwise, and they are downloaded more often every day.
        given = {"adapter_id": [one.adapter_id for one in same], "downloads": [one.downloads for one in same]}
        for name, values in given.items():
            rows = rows.set_column(KEPT.get_field_index(name), KEPT.field(name), pa.array(values, KEPT.field(name).type))
        return rows

    def merge_files(self, rows: pa.Table) -> None:
        """Make one file of the rows of this index and of those of other adapters that were known."""
        blocks = [name for name in self._folder.list_files(".parquet") if name.startswith(self.blocks.index)]
        if not blocks and len(self._names) <= 1:
            return
        others = self._known.filter(pc.invert(pc.is_in(self._known["uri"], rows["uri"].combine_chunks())))
        kept = pa.concat_tables([rows.filter(pc.is_valid(rows["state"])), others])
        self._folder.write_table(f"{uuid.uuid4().hex}.parquet", kept)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(self._folder.delete, [*self._names, *blocks]))

    def _read(self, name: str) -> pa.Table:
        try:
            return self._folder.read_table(name)
        except (FileNotFoundError, pa.ArrowInvalid):  # another index has just made it a part of its own, or it is cut short
            return KEPT.empty_table()
