"""How the refreshes of a home go, for who is to be woken: `status.json`, and the same for Prometheus in `metrics.prom`.

Written at the end of every refresh, also of one that had nothing to do and started nothing: a target that is up to date still is
one that went well.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.core.storage import Folder
from pipeline.refresh.history import FAILURES

STATUS_FILE, METRICS_FILE = "status.json", "metrics.prom"
NOTHING_TO_DO = "nothing to do"
OUTCOMES = ("published", "withdrawn", "kept", NOTHING_TO_DO, *FAILURES)

LAST_SUCCESS, COUNTS = "mashup_refresh_last_success_timestamp_seconds", "mashup_refresh_outcomes"
"""Names of the metrics, here and in `cluster/telemetry.py`."""

Status = dict[str, dict[str, Any]]
"""Of each target the last `outcome`, `last_success` (a time, or null), and how often each of OUTCOMES came, as `outcomes`."""


def note(home: Folder, came: Mapping[str, str]) -> Status:
    """Add what came of each target in a refresh that ends now; targets that are not refreshed any more are forgotten."""
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    before = home.read_json(STATUS_FILE)["targets"] if home.exists(STATUS_FILE) else {}
    status = {target: _with(before.get(target), outcome, now) for target, outcome in came.items()}
    home.write_json(STATUS_FILE, {"time": now, "targets": status})
    home.write_text(METRICS_FILE, "".join(f"{line}\n" for line in _lines(home.uri, status)))
    return status


def last_success(target: Mapping[str, Any]) -> float:
    """In seconds since 1970; 0: a target never went well."""
    return datetime.fromisoformat(target["last_success"]).timestamp() if target["last_success"] else 0.0


def _with(before: dict[str, Any] | None, outcome: str, now: str) -> dict[str, Any]:
    """A target's status after one more refresh."""
    before = before or {"last_success": None, "outcomes": dict.fromkeys(OUTCOMES, 0)}
    counts = before["outcomes"]
    return {
        "outcome": outcome,
        "last_success": before["last_success"] if outcome in FAILURES else now,
        "outcomes": counts | {outcome: counts[outcome] + 1},
    }


def _lines(run: str, status: Status) -> Iterator[str]:
    """The text that Prometheus reads."""
    yield f"# TYPE {LAST_SUCCESS} gauge"
    for target, found in status.items():
        yield f"{LAST_SUCCESS}{_labels(run=run, target=target)} {last_success(found):.0f}"
    yield f"# TYPE {COUNTS} gauge"
    for target, found in status.items():
        for outcome, count in found["outcomes"].items():
            yield f"{COUNTS}{_labels(run=run, target=target, outcome=outcome)} {count}"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels.items()) + "}"
