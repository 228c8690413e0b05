"""How fast earlier runs were: `<store>/<scope>/rates/`, beside the scores of the same base model and way of scoring.

A measurement is of one kind of work on one kind of worker, a text such as `search.engine_pool.scoring_kind` gives; it says
nothing of another kind. It is kept a second time under what the config asks for alone: on a cluster that starts from zero there
is no GPU yet whose name could be looked up. Files are only added, so that runs and machines can share them.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.search.score_store import ScoreStore

RECENT = 5
"""Measurements of a kind that count: the last ones that have a value."""

LOOKED_AT = 4 * RECENT
"""Measurements that are read for them: not every one has every value."""


@dataclass(frozen=True)
class Rates:
    """What was measured beside one score store."""

    folder: Folder

    @classmethod
    def beside(cls, store: ScoreStore) -> "Rates":
        return cls(store.folder.sub("rates"))

    def keep(self, kind: str, measured: Mapping[str, float], asked: str | None = None) -> None:
        """Keep one measurement: name -> value.

        Args:
            asked: the kind by what the config asks for alone.
        """
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
        for one in {kind, asked or kind}:
            self._of(one).write_json(name, {"kind": kind, "measured": dict(measured)})

    def recent(self, kind: str) -> dict[str, float]:
        """The median of the last measurements of this kind, by name; empty where there are none."""
        folder = self._of(kind)
        files = [name for name in folder.list_files(".json")[-LOOKED_AT:] if folder.is_complete(name)]
        values: dict[str, list[float]] = {}
        for file in files:
            for name, value in folder.read_json(file)["measured"].items():
                values.setdefault(name, []).append(value)
        return {name: median(found[-RECENT:]) for name, found in values.items()}

    def _of(self, kind: str) -> Folder:
        return self.folder.sub(digest(kind))
