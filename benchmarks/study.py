"""Is a finetune from a mashup better than one from the base, and than the paper's recipe? Leave-one-out over tasks.

    python -m benchmarks.study [--quick]                                                   # the demo's pool and tasks
    python -m benchmarks.study [--quick] --base BASE --pool FOLDER --tasks FOLDER [--tasks ...]
    python -m benchmarks.study [--quick] --base BASE --tasks FOLDER [--settings FILE]      # donors are trained first

Each folder of tasks holds <task>/train.jsonl and, as test split, <task>/test.jsonl or validation.jsonl. Without a pool, a donor
is trained from the base on each task with a seed of its own. For each task, adapters of the pool that are named like it (or like
it with -<seed> behind) are left out; `mashup run` does the rest, in <work>/<task>. A second call goes on where the first was
interrupted; with more seeds or learning rates it trains only what is new. `study.yaml` has the settings.

Means over tasks; a task where the verdict is to start from the base counts as no difference, one without parity as nothing saved:
    steps_saved                    share of the base run's steps that the mashup did without until parity
    seconds_saved                  the same of its training seconds, all overhead counted (negative: it took longer)
    exact_match, token_accuracy    mashup minus base on the test split, in points; `over_paper`: minus the paper's start
    p                              two-sided, by flipping the signs of the tasks' differences in all ways
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from examples.base_model import base_model
from examples.tasks import DONORS, TARGET, draw
from pipeline.cluster.connect import connect
from pipeline.config import Config, build_config
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.parts import Parts
from pipeline.core.storage import Folder
from pipeline.data.splits import take_samples
from pipeline.report.plots import COLOURS, MARKERS, OTHER_COLOUR, read_curves
from pipeline.run import run_all
from pipeline.train.arm import Arm, Job, Lora, copy_weights
from pipeline.train.tune import train_arms

SETTINGS = Path(__file__).parent / "study.yaml"
QUICK = {
    "search": {"samples": 16},
    "train": {"steps": 8, "batch_size": 8, "evaluations": 2, "seeds": [0]},
    "compare": {"inits": ["base", "mashup", "paper"]},
    "target": {"validation_rows": 16, "test_rows": 50},
}
TRAINING_FILE = "training.json"
"""Written last into a donor's folder: how it was trained."""

DEMO_ROWS = {"train": 400, "test": 200}
MAX_FLIPS = 12
"""Tasks up to which all flips of sign are tried; beyond, a seeded draw of as many."""

Row = dict[str, Any]


def main(
    quick: Annotated[bool, typer.Option(help="Two tasks, few rows and steps, no controls but the paper's start.")] = False,
    base: Annotated[str, typer.Option(help="Base model; by default the demo's.")] = "",
    pool: Annotated[str, typer.Option(help="Donors; by default the demo's, or trained on the tasks.")] = "",
    tasks: Annotated[list[Path], typer.Option(help="Folders of <task>/train.jsonl; by default the demo's tasks.")] = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="Only these tasks.")] = [],  # noqa: B006
    settings: Annotated[
        Path, typer.Option(help="What each run is asked, and the donors' shape and number of epochs.")
    ] = SETTINGS,
    work: Annotated[Path, typer.Option(help="Folder of the runs, and of the table and the curves.")] = Path(".cache/study"),
) -> None:
    """Run the study; the last line is a JSON object."""
    asked = yaml.safe_load(settings.read_text())
    donor, epochs = asked.pop("donor"), asked.pop("epochs", None)
    if quick:
        asked = {name: asked.get(name, {}) | QUICK.get(name, {}) for name in asked | QUICK}
        asked["train"]["learning_rates"] = asked["train"]["learning_rates"][-1:]
    asked["base"] = base or str(base_model())
    work = work.resolve()
    targets = _targets(tasks) if tasks else _demo_targets(work)
    configs = {name: _config(asked, epochs, work / name, target) for name, target in targets.items()}
    if not pool:
        pool = _train_donors(configs, Lora(**donor), work) if tasks else "examples/pool"
    rows: list[Row] = []
    for name in [name for name in configs if not only or name in only][: 2 if quick else None]:
        config = configs[name].model_copy(update={"pool": str(Path(pool).resolve()), "exclude": _own(name)})
        rows.append(_row(name, config, run_all(config)))
        typer.echo(f"so far: {json.dumps(rows[-1])}", err=True)
        (work / "study.json").write_text(json.dumps(rows, indent=2) + "\n")
    _draw(work, rows).savefig(work / "study.png", dpi=110)
    print(_table(rows))
    print(json.dumps(conclude(rows)))


def conclude(rows: Sequence[Row]) -> Row:
    """What the tasks say together."""
    found: Row = {
        "tasks": len(rows),
        "mashups": sum(row["verdict"] == "mashup" for row in rows),
        "parity_reached": sum(row["steps_saved"] is not None for row in rows),
        "steps_saved": round(fmean(row["steps_saved"] or 0.0 for row in rows), 3),
        "seconds_saved": round(fmean(row["seconds_saved"] for row in rows), 3),
    }
    for rival in ("base", "paper"):
        pairs = [(row["inits"].get("mashup", row["inits"]["base"]), row["inits"].get(rival)) for row in rows]
        for metric in ("exact_match", "token_accuracy"):
            differences = [100 * (ours[metric] - theirs[metric]) for ours, theirs in pairs if theirs]
            if differences:
                name = metric if rival == "base" else f"{metric}_over_{rival}"
                found |= {name: round(fmean(differences), 2), f"{name}_p": round(sign_flips(differences), 3)}
    return found | {"worse_than_base": [row["task"] for row in rows if row["worse"]]}


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences under flips of their signs (Fisher's permutation test)."""
    values, n = np.array(differences), len(differences)
    if n <= MAX_FLIPS:
        signs = np.array(list(product((1, -1), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1, -1), (2**MAX_FLIPS, n))
    return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-9).mean())


def _config(asked: Row, epochs: float | None, run: Path, target: Row) -> Config:
    """What one run is asked; the steps of so many epochs where these are given."""
    content = {**asked, "run": str(run), "pool": "-", "target": asked.get("target", {}) | target}
    if epochs is not None:
        rows = len(Path(target["train"]).read_text().splitlines())
        batch = asked["train"]["batch_size"]
        content["train"] = asked["train"] | {"steps": math.ceil(epochs * rows / batch)}
    return build_config(content, run.name)


def _train_donors(configs: dict[str, Config], shape: Lora, work: Path) -> str:
    """A pool of one donor a task, trained from the base like the arms of a comparison; validation picks its learning rate."""
    connect()
    for seed, (task, config) in enumerate(configs.items(), start=1000):
        donor, place = Folder.at(work / "pool" / task), Folder.at(work / "donors" / task)
        if donor.exists(TRAINING_FILE):
            continue
        if not place.exists("data/test.parquet"):
            for split, table in take_samples(config).training.items():
                place.write_table(f"data/{split}.parquet", table)
        key = digest(config.base, config.train.model_dump(), shape)[:8]
        arms = [Arm("base", rate, seed) for rate in config.train.learning_rates]
        jobs = [Job(arm, config.base, shape, config.train, place.sub("data"), place, key) for arm in arms]
        outcomes = train_arms(jobs, place.sub("train"), lambda text: typer.echo(text, err=True), place.uri)
        best = min(outcomes, key=lambda outcome: min(point["eval_nll"] for point in outcome["curve"]))
        copy_weights(place.sub("train", *best["checkpoint"].split("/")), donor)
        donor.write_json(TRAINING_FILE, {"task": task, "lr": best["lr"], "seed": seed, "best_step": best["best_step"]})
    return str(work / "pool")


def _targets(folders: Sequence[Path]) -> dict[str, Row]:
    """Task name -> data files of a config; validation rows come out of train, the other file is the test split."""
    found: dict[str, Row] = {}
    for train in (file for folder in folders for file in sorted(folder.glob("*/train.jsonl"))):
        test = next((file for name in ("test", "validation") if (file := train.parent / f"{name}.jsonl").exists()), None)
        if test is None:
            raise InputError(f"{train.parent}: no test.jsonl and no validation.jsonl; the study needs one as test split")
        found[train.parent.name] = {"train": str(train), "test": str(test)}
    return found


def _demo_targets(work: Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for task, make in {"reviews-gadgets": TARGET, **DONORS}.items():
        files = {split: work / "tasks" / task / f"{split}.jsonl" for split in DEMO_ROWS}
        for split, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) + "\n" for row in draw(make, f"study {task} {split}", DEMO_ROWS[split])]
            if not file.exists():  # a file that is written anew looks like new data
                file.write_text("".join(lines))
        found[task] = {split: str(file) for split, file in files.items()}
    return found


def _own(task: str) -> tuple[str, ...]:
    """Patterns of the adapters of a task: in any folder, its name, or this with a seed behind."""
    return task, f"{task}-[0-9]*", f"*/{task}", f"*/{task}-[0-9]*"


def _row(task: str, config: Config, summary: Row) -> Row:
    inits = {
        init: {metric: found[f"test_{metric}"]["mean"] for metric in ("nll", "token_accuracy", "exact_match")}
        | {"spread": found["test_exact_match"]["spread"], "lr": found["lr"], "parity_steps": found.get("parity_steps")}
        for init, found in summary["inits"].items()
    }
    overhead, parity = summary["overhead_seconds"]["total"], summary["parity"]
    base_seconds = summary["inits"]["base"]["train_seconds"]
    reached = parity is not None and parity["reached"]
    n_test = len(Parts(Folder.at(config.run), "data/test.parquet"))
    ours, base = (inits.get(init, inits["base"])["exact_match"] for init in ("mashup", "base"))
    noise = 2 * (max(ours * (1 - ours) + base * (1 - base), 1 / n_test) / n_test) ** 0.5
    return {
        "task": task,
        "verdict": summary["verdict"],
        "recipe": summary["recipe"],
        "donors": summary["donors"],
        "inits": inits,
        "steps_saved": parity["steps_saved"] if reached else (0.0 if summary["verdict"] == "base" else None),
        "seconds_saved": parity["seconds_saved"] if reached else -overhead / base_seconds,
        "overhead_seconds": overhead,
        "base_seconds": base_seconds,
        "worse": bool(ours < base - noise),
        "run": str(config.run),
    }


def _table(rows: Sequence[Row]) -> str:
    inits = list(dict.fromkeys(init for row in rows for init in row["inits"]))
    heads = ["task", "recipe", "parity of steps", "overhead / base", *(f"{init}: NLL, match" for init in inits)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        steps = "not reached" if row["steps_saved"] is None else f"{1 - row['steps_saved']:.2f}"
        cells = [row["task"], row["recipe"] or "base", steps, f"{row['overhead_seconds']:.0f} s / {row['base_seconds']:.0f} s"]
        for init in inits:
            cells.append(_cell(row["inits"][init]) if init in row["inits"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Row) -> str:
    """Test NLL and exact match in %, this with its spread over seeds where there are several."""
    spread = "" if found["spread"] is None else f" ± {100 * found['spread']:.1f}"
    return f"{found['nll']:.3f}, {100 * found['exact_match']:.1f}{spread}"


def _draw(work: Path, rows: Sequence[Row]) -> Figure:
    """Validation curves of every task, each init at the learning rate that validation chose."""
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * height + 0.6), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    shown: dict[str, Any] = {}
    for panel, row in zip(panels, rows, strict=False):
        for curve in read_curves(pq.read_table(work / row["task"] / "comparison.parquet"), "eval_nll"):
            if curve.lr == row["inits"][curve.init]["lr"]:
                style = {"color": COLOURS.get(curve.init, OTHER_COLOUR), "marker": MARKERS[curve.init], "markersize": 4}
                (shown[curve.init],) = panel.plot(curve.steps, curve.mean, linewidth=1.4, **style)
        panel.set_title(row["task"], fontsize=9)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))  # no crowd on an axis of two decades
        panel.tick_params(axis="y", which="both", labelsize=8)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=len(shown), fontsize=10)
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("validation NLL, nats a token", fontsize=10)
    return figure


if __name__ == "__main__":
    typer.run(main)
