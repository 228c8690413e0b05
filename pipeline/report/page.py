"""Run folder -> report.html: one page that needs nothing else, no network and no script.

Whatever the run has is shown; a stage that was not run yet is said to be so. Ids, reasons and URIs come from strangers:
the template escapes them all, and only our own plots go in as they are.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.adapters.licences import conflicts
from pipeline.core.base_ref import name_of
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID, CATALOGUE, COMPARISON, LEADERBOARD, METRIC_ROWS, require
from pipeline.report import plots, words

REPORT_FILE = "report.html"

VISIBLE_ROWS = 25
"""Rows of a long table that are shown at once; the others are one click away."""

CHANGED_ROWS = 100
"""Rows of the test split that are shown of those that got better, and of those that got worse."""

MAX_TEXT = 300
"""Characters of a prompt or an answer; of a longer one the middle is left out."""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; None or empty where the stage was not run yet."""

    uri: str
    config: dict[str, Any]
    catalogue: pa.Table | None
    samples: dict[str, Any] | None
    leaderboard: pa.Table | None
    failures: dict[str, str]
    contamination: dict[str, list[str]]
    selection: dict[str, Any] | None
    comparison: pa.Table | None
    metric_rows: pa.Table | None
    stages: dict[str, dict[str, Any]]
    summary: dict[str, Any] | None


def write_report(run: Folder) -> str:
    """Write the page into the run folder.

    Returns:
        The page's URI.
    """
    run.write_text(REPORT_FILE, render(read_run(run)))
    return f"{run.uri}/{REPORT_FILE}"


def read_run(run: Folder) -> RunFiles:
    """Read every table and document that the page shows; one that is cut short counts as not there.

    Raises:
        ValueError: a table lacks a column; the message names it.
    """
    return RunFiles(
        uri=run.uri,
        config=yaml.safe_load(run.read_text("config.yaml")) if run.exists("config.yaml") else {},
        catalogue=_table(run, "catalogue.parquet", CATALOGUE),
        samples=_json(run, "samples.json"),
        leaderboard=_table(run, "leaderboard.parquet", LEADERBOARD),
        failures=_json(run, "scoring_failures.json") or {},
        contamination=_json(run, "contamination.json") or {},
        selection=_json(run, "selection.json"),
        comparison=_table(run, "comparison.parquet", COMPARISON),
        metric_rows=_table(run, "metric_rows.parquet", METRIC_ROWS),
        stages=_json(run, "stages.json") or {},
        summary=_json(run, "summary.json"),
    )


def render(files: RunFiles) -> str:
    """The page as HTML."""
    return template("page.html").render(
        files=files,
        base=name_of(files.config.get("base") or ""),
        target=(files.config.get("target") or {}).get("train"),
        verdict=words.verdict(files.summary, files.selection),
        headlines=words.headlines(files.summary) if files.summary else [],
        hedge=words.hedge_of(files.summary),
        foretold=words.foretold(files.summary, files.selection),
        passes=words.passes(files.summary) if files.summary else None,
        pays=words.pays(words.parity_of(files.summary)),
        asked=words.asked_measure(metric) if (metric := (files.summary or {}).get("metric")) else None,
        changed=_changed(files),
        arms=_arms(files.comparison, _chosen_rates(files), words.hedge_of(files.summary)),
        leaderboard=files.leaderboard.to_pylist() if files.leaderboard else [],
        donor_ids=_donor_ids(files),
        conflicts=_conflicts(files),
        set_aside=_set_aside(files),
        warnings=_warnings(files),
        left_out=_left_out(files.samples),
        stages=_stages(files.stages),
        plots=_plots(files),
        settings=_settings(files.config),
        base_id=BASE_ID,
        visible=VISIBLE_ROWS,
        most_changed=CHANGED_ROWS,
        max_text=MAX_TEXT,
    )


def _table(run: Folder, name: str, schema: pa.Schema) -> pa.Table | None:
    return require(run.read_table(name), schema, name) if run.is_complete(name) else None


def _json(run: Folder, name: str) -> Any:
    return run.read_json(name) if run.is_complete(name) else None


@cache
def template(name: str) -> Template:
    """A page of this folder. Whatever is put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measures: list[Callable[..., str]] = [words.nll, words.signed, words.percent, words.duration, words.ratio, words.rate]
    environment.filters |= {function.__name__: function for function in (*measures, words.unbroken, words.shorten)}
    environment.globals |= {"count": words.count, "METHODS": words.METHODS, "DASH": words.DASH}
    return environment.get_template(name)


def _plots(files: RunFiles) -> dict[str, Markup]:
    """The plots that the run has tables for."""
    found: dict[str, str] = {}
    if files.comparison:
        chosen = _chosen_rates(files)
        found["loss"] = plots.loss_plot(files.comparison, chosen, words.parity_of(files.summary))
        found["accuracy"] = plots.accuracy_plot(files.comparison, chosen)
    parity = words.parity_of(files.summary)
    if parity and parity["reached"] and parity.get("break_even_seconds"):
        found["pays"] = plots.pays_plot(parity)
    if files.leaderboard and len(files.leaderboard) > 1:
        found["leaderboard"] = plots.leaderboard_plot(files.leaderboard, _donor_ids(files))
    if files.stages:
        found["time"] = plots.time_plot(files.stages)
    return {name: Markup(svg) for name, svg in found.items()}


def _chosen_rates(files: RunFiles) -> dict[str, float]:
    return {init: arm["lr"] for init, arm in files.summary["inits"].items()} if files.summary else {}


def _donor_ids(files: RunFiles) -> set[str]:
    return {donor["adapter_id"] for donor in files.selection["donors"]} if files.selection else set()


def _conflicts(files: RunFiles) -> str | None:
    """What stands against passing on the mashup, by its donors' licences."""
    donors = files.selection["donors"] if files.selection else []
    return conflicts({donor["adapter_id"]: donor["license"] for donor in donors})


def _arms(comparison: pa.Table | None, chosen: dict[str, float], hedge: words.Json | None) -> list[dict[str, Any]]:
    """One row for each training run: its best and its last evaluation."""
    runs: dict[tuple[str, float, int], list[dict[str, Any]]] = defaultdict(list)
    for row in comparison.to_pylist() if comparison else []:
        runs[row["init"], row["lr"], row["seed"]].append(row)
    return [
        {
            "init": init,
            "lr": lr,
            "seed": seed,
            "chosen": chosen.get(init) == lr,
            "stopped": hedge is not None and hedge["stopped"] == init,
            "best": min(rows, key=lambda row: row["eval_nll"] if words.is_number(row["eval_nll"]) else float("inf")),
            "last": max(rows, key=lambda row: row["step"]),
        }
        for (init, lr, seed), rows in runs.items()
    ]


def _changed(files: RunFiles) -> dict[str, Any] | None:
    """What `compare.metric` found row by row, from the largest change on; None: nothing to compare."""
    rows = files.metric_rows.to_pylist() if files.metric_rows else []
    pairs = [row for row in rows if row["base_score"] is not None and row["mashup_score"] is not None]
    if not (pairs and (files.summary or {}).get("metric")):
        return None
    change = lambda row: row["mashup_score"] - row["base_score"]  # noqa: E731
    better = sorted((row for row in pairs if change(row) > 0), key=change, reverse=True)
    worse = sorted((row for row in pairs if change(row) < 0), key=change)
    return {
        "seeds": len({row["seed"] for row in pairs}) > 1,
        "same": len(pairs) - len(better) - len(worse),
        "kinds": {"better": better, "worse": worse},
    }


def _set_aside(files: RunFiles) -> list[dict[str, str]]:
    """Adapters that are not on the leaderboard, with the stage that said so and its reason."""
    rows = files.catalogue.to_pylist() if files.catalogue else []
    refused = [{"adapter_id": row["adapter_id"], "stage": "index", "reason": row["reason"]} for row in rows if row["reason"]]
    failed = [{"adapter_id": name, "stage": "search", "reason": reason} for name, reason in files.failures.items()]
    return refused + failed


def _warnings(files: RunFiles) -> dict[str, list[str]]:
    """Warning -> the valid adapters that it is about; in a pool it is often the same for all."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in files.catalogue.to_pylist() if files.catalogue else []:
        if row["status"] == "ok" and row["warning"]:
            found[row["warning"]].append(row["adapter_id"])
    for name, sentences in files.contamination.items():
        for sentence in sentences:
            found[sentence].append(name)
    return dict(found)


def _left_out(samples: dict[str, Any] | None) -> list[tuple[str, str, int]]:
    """(role, reason, rows) of the target's rows that could not be used."""
    rows = (samples or {}).get("rows") or {}
    return [(role, reason, n) for role, reasons in rows.items() for reason, n in reasons.items() if reason != "used"]


def _stages(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    total = sum(stage["seconds"] for stage in stages.values()) or 1.0
    return [
        {
            "name": name,
            "seconds": stage["seconds"],
            "share": stage["seconds"] / total,
            "done": stage["done"],
            "details": "; ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in stage["details"].items()),
        }
        for name, stage in stages.items()
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The config as YAML, apart from what it ran with."""
    asked = {key: value for key, value in config.items() if key not in ("versions", "machine")}
    return {
        "yaml": yaml.safe_dump(asked, sort_keys=False, allow_unicode=True) if asked else "",
        "versions": config.get("versions") or {},
        "machine": config.get("machine") or {},
    }
