"""What an alert looks at: a time that moves with every refresh that went well, and counts that begin at 0."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.cluster.telemetry import METRICS
from pipeline.core.storage import Folder
from pipeline.refresh import status
from pipeline.refresh.history import FAILURES
from pipeline.refresh.status import COUNTS, LAST_SUCCESS, METRICS_FILE, NOTHING_TO_DO, OUTCOMES, STATUS_FILE, last_success, note

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def home(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path)


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """day(n): it is the n-th of a month."""

    def set_day(number: int) -> float:
        now = datetime(2026, 1, number, tzinfo=UTC)
        monkeypatch.setattr(status, "datetime", type("Clock", (datetime,), {"now": staticmethod(lambda zone: now)}))
        return now.timestamp()

    return set_day


def metrics(home: Folder) -> dict[tuple[str, ...], float]:
    """Name, target and outcome of each sample, as Prometheus' own client reads them."""
    families = text_string_to_metric_families(home.read_text(METRICS_FILE))
    samples = [one for family in families for one in family.samples]
    assert {one.labels["run"] for one in samples} == {home.uri}
    return {(one.name, *(one.labels[key] for key in ("target", "outcome") if key in one.labels)): one.value for one in samples}


def test_a_refresh_with_nothing_to_do_went_well_and_one_that_failed_did_not(home: Folder, day: Any) -> None:
    first = day(1)
    note(home, {"law": "published", "sport": "failed"})
    second = day(2)
    note(home, {"law": NOTHING_TO_DO, "sport": "wrong input"})
    day(3)
    found = note(home, {"law": "failed", "sport": "failed"})
    assert {name: last_success(one) for name, one in found.items()} == {"law": second, "sport": 0.0}
    assert first < second
    assert (found["law"]["outcome"], found["law"]["outcomes"]["published"], found["sport"]["outcomes"]["failed"]) == (
        "failed",
        1,
        2,
    )
    assert home.read_json(STATUS_FILE) == {"time": "2026-01-03T00:00:00Z", "targets": found}


def test_prometheus_reads_the_same(home: Folder, day: Any) -> None:
    now = day(1)
    note(home, {"law": "kept", "sport": "failed"})
    found = metrics(home)
    assert found[LAST_SUCCESS, "law"] == now
    assert found[LAST_SUCCESS, "sport"] == 0
    assert {outcome: found[COUNTS, "law", outcome] for outcome in OUTCOMES} == {
        outcome: outcome == "kept" for outcome in OUTCOMES
    }


def test_targets_that_are_gone_are_forgotten(home: Folder) -> None:
    note(home, {"law": "kept", "sport": "failed"})
    assert note(home, {"law": "kept"}).keys() == {"law"}
    assert {target for _, target, *_ in metrics(home)} == {"law"}


def test_the_cluster_tells_metrics_of_the_same_names() -> None:
    assert {LAST_SUCCESS, COUNTS} <= METRICS.keys()


def test_the_alerts_of_the_docs_are_about_what_is_written(home: Folder) -> None:
    note(home, {"law": "failed"})
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text()
    (rules,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "alert:" in text)
    asked = [rule["expr"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]]
    assert len(asked) == 2
    for expression in asked:
        assert {name for name, *_ in metrics(home)} & set(re.findall(r"\w+", expression))
    (outcomes,) = re.findall(r'outcome=~"(.*?)"', "".join(asked))
    assert set(outcomes.split("|")) == set(FAILURES)
