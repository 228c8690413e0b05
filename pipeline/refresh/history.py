"""The record of what refreshes did: `<home>/history.parquet`, a row for each target that one worked on.

It is their memory too: a row holds digests of what was seen, by which the next refresh knows what changed.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.core.storage import Folder
from pipeline.core.tables import HISTORY, SEEN, require

FILE = "history.parquet"
FAILURES = ("failed", "wrong input")
NEW = "new target"

Seen = dict[str, str]
"""Of each of SEEN a digest."""


@dataclass
class History:
    """The rows of a home, the oldest first."""

    home: Folder
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, home: Folder) -> "History":
        table = require(home.read_table(FILE), HISTORY, FILE) if home.exists(FILE) else HISTORY.empty_table()
        return cls(home, table.to_pylist())

    def add(self, row: dict[str, Any]) -> None:
        """Put down a row of schema HISTORY; keys that are not there are null."""
        self.rows.append(row)
        self.home.write_table(FILE, pa.Table.from_pylist(self.rows, schema=HISTORY))

    def changed(self, target: str, seen: Seen) -> list[str] | None:
        """What changed since the target was last refreshed and went well. None: there is nothing to do.

        A target that failed is tried again, even where nothing changed since.
        """
        rows = [row for row in self.rows if row["target"] == target]
        last_good = next((row for row in reversed(rows) if row["outcome"] not in FAILURES), None)
        if last_good is None:
            return [NEW]
        changed = [name for name in SEEN if seen[name] != last_good["seen"][name]]
        return None if last_good is rows[-1] and not changed else changed
