"""Metrics as a node gives them, the stage's time among them."""

import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import ray

from pipeline.cluster import telemetry
from pipeline.core.ledger import Ledger, Outputs
from pipeline.core.storage import Folder
from pipeline.search import scoring
from pipeline.search.scoreboard import RaceProgress


def test_nothing_is_told_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(telemetry, "_gauge", lambda name: pytest.fail("a gauge was made"))
    telemetry.tell("mashup_search_rung", 1, "a-run")


def exported(names: set[str]) -> dict[str, float]:
    """Our metrics at this node's endpoint, by name and own tag, once all of these names are there."""
    (node,) = [one for one in ray.nodes() if one["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while not names <= found.keys() and time.monotonic() < deadline:
        time.sleep(1)
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        found = dict(_parse(line) for line in lines if line.startswith("ray_mashup_"))
    return found


def _parse(line: str) -> tuple[str, float]:
    name, _, rest = line.removeprefix("ray_").partition("{")
    labels, _, value = rest.rpartition("} ")
    tags = dict(label.split("=", 1) for label in labels.split(",") if "=" in label)
    own = [tags[tag].strip('"') for tag in ("run", "stage", "arm", "target", "outcome") if tag in tags]
    return ":".join([name, *own]), float(value)


@pytest.mark.usefixtures("ray_session")
def test_every_metric_is_exported_by_the_node(tmp_path: Path) -> None:
    ledger = Ledger(Folder.at(tmp_path), {"probing": Outputs([])}, partial(telemetry.tell_stage, "a-run"))
    with ledger.perform("probing", "key"):
        pass
    telemetry.tell_training("a-run", "some-arm", tokens=300, seconds=2.0)
    telemetry.tell_refresh("a-home", "law", last_success=1.5e9, outcomes={"kept": 3, "failed": 1})
    telemetry.tell_training("a-run", "not-begun", tokens=0, seconds=0.0)
    race = RaceProgress(adapter_samples=12, tokens=900, seconds=3.0, engines=2, rung=1, rungs=3, outstanding=5)
    scoring._measure("a-run", race)
    expected = {
        "mashup_train_tokens_per_second:a-run:some-arm": 150.0,
        "mashup_refresh_last_success_timestamp_seconds:a-home:law": 1.5e9,
        "mashup_refresh_outcomes:a-home:law:kept": 3.0,
        "mashup_refresh_outcomes:a-home:law:failed": 1.0,
        "mashup_search_engines:a-run": 2.0,
        "mashup_search_rung:a-run": 1.0,
        "mashup_search_outstanding:a-run": 5.0,
        "mashup_search_adapter_samples:a-run": 12.0,
        "mashup_search_tokens_per_second:a-run": 300.0,
    }
    found = exported({"mashup_stage_seconds:a-run:probing", *expected})
    assert found["mashup_stage_seconds:a-run:probing"] == pytest.approx(ledger.seconds("probing"))
    assert {name: found[name] for name in expected} == expected
    assert "mashup_train_tokens_per_second:a-run:not-begun" not in found
    assert {name.partition(":")[0] for name in found} == telemetry.METRICS.keys()
