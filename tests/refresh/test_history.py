"""What refreshes remember, and by which they know what changed."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.storage import Folder
from pipeline.core.tables import SEEN
from pipeline.refresh.history import History

BEFORE = dict.fromkeys(SEEN, "1")


def row(target: str, outcome: str, **seen: str) -> dict[str, Any]:
    return {"time": datetime.now(UTC), "target": target, "changed": [], "seen": BEFORE | seen, "outcome": outcome}


@pytest.mark.parametrize(
    ("rows", "seen", "changed"),
    [
        ([], {}, ["new target"]),
        ([("sport", "kept", {})], {}, ["new target"]),
        ([("law", "kept", {})], {}, None),
        ([("law", "published", {}), ("sport", "failed", {})], {}, None),
        ([("law", "withdrawn", {})], {"data": "2", "base": "3"}, ["data", "base"]),
        ([("law", "failed", {})], {}, ["new target"]),
        ([("law", "kept", {}), ("law", "failed", {})], {}, []),
        ([("law", "kept", {}), ("law", "wrong input", {"data": "2"})], {"data": "2"}, ["data"]),
        ([("law", "kept", {}), ("law", "kept", {"data": "2"})], {}, ["data"]),
        ([("law", "failed", {}), ("law", "kept", {})], {}, None),
    ],
)
def test_what_changed_since_it_last_went_well(
    rows: list[tuple[str, str, dict[str, str]]], seen: dict[str, str], changed: list[str] | None, tmp_path: Path
) -> None:
    for target, outcome, then in rows:
        History.of(Folder.at(tmp_path)).add(row(target, outcome, **then))
    assert History.of(Folder.at(tmp_path)).changed("law", BEFORE | seen) == changed


def test_rows_come_back_as_they_were_put_down(tmp_path: Path) -> None:
    History.of(Folder.at(tmp_path)).add(row("law", "kept"))
    History.of(Folder.at(tmp_path)).add(row("law", "failed") | {"reason": "no"})
    first, second = History.of(Folder.at(tmp_path)).rows
    assert (first["outcome"], first["reason"], first["mashup"]) == ("kept", None, None)
    assert (second["outcome"], second["reason"]) == ("failed", "no")
    assert first["time"] <= second["time"] <= datetime.now(UTC)
