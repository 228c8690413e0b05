"""How fast earlier runs were: `<store>/<scope>/rates/`, beside the scores of the same base model and way of scoring.

A measurement is of one kind of work on one kind of worker, a text such as `search.stream.scoring_kind` gives; it says nothing
of another kind. Files are only added, so that runs and machines can share them.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from pipeline.ledger import digest
from pipeline.search.store import ScoreStore
from pipeline.storage import Folder

RECENT = 5
"""Measurements of a kind that count: the last ones."""


@dataclass(frozen=True)
class Rates:
    """What was measured beside one score store."""

    folder: Folder

    @classmethod
    def beside(cls, store: ScoreStore) -> "Rates":
        return cls(store.folder.sub("rates"))

    def keep(self, kind: str, measured: Mapping[str, float]) -> None:
        """Keep one measurement: name -> value."""
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
        self._of(kind).write_json(name, {"kind": kind, "measured": dict(measured)})

    def recent(self, kind: str) -> dict[str, float]:
        """The median of the last measurements of this kind, by name; empty where there are none."""
        folder = self._of(kind)
        found = [folder.read_json(name)["measured"] for name in folder.list_files(".json")[-RECENT:] if folder.is_whole(name)]
        return {name: median(one[name] for one in found if name in one) for name in found[-1]} if found else {}

    def _of(self, kind: str) -> Folder:
        return self.folder.sub(digest(kind))
