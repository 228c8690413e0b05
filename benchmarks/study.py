"""Is a finetune from a mashup better than one from the base, and than the paper's recipe? Leave-one-out over tasks.

    python -m benchmarks.study [--quick]                                                   # the demo's pool and tasks
    python -m benchmarks.study [--quick] --base BASE --pool FOLDER --tasks FOLDER [--tasks ...]
    python -m benchmarks.study [--quick] --base BASE --tasks FOLDER [--settings FILE]      # donors are trained first

Each folder of tasks holds <task>/train.jsonl and <task>/test.jsonl or validation.jsonl. Without a pool, a donor is trained from
the base on each task with a seed of its own. For each task, adapters of the pool that are named like it (or like it with -<seed>
behind) are left out; `mashup run` does the rest, in <work>/<task>. `study.yaml` has the settings; besides those of a run:

    donor, epochs    the shape of donors, and how long they and the arms train in place of train.steps
    families         patterns of names: an adapter that matches the task's own pattern is kin
    reported         test (by default), or validation: the file beside train.jsonl is then the validation split, as in the paper

Each task's arms are appended to <results>/arms.csv when it is done (`benchmarks/study_arms.py`), to be committed. What stands
there for the same settings, base, pool and data is not run again, on whatever machine, so that a call goes on where another
ended; `python -m benchmarks.study_tables` makes the tables and figures from it.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import pyarrow.compute as pc
import typer
import yaml

from benchmarks.over_tasks import over_tasks
from benchmarks.study_arms import FILE, StudyArm, add_arms, lacking, read_arms
from benchmarks.study_tables import METRICS, RESULTS, current, differences, saved, tasks_of, write_tables
from examples.base_model import base_model
from examples.tasks import DONORS, TARGET, draw
from pipeline.cluster.connect import connect
from pipeline.config import Config, build_config
from pipeline.core.base_ref import name_of
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.parts import Parts
from pipeline.core.storage import Folder
from pipeline.data.splits import split_of, take_samples
from pipeline.model.base_model import fingerprint
from pipeline.run import run_all
from pipeline.train.arm import Arm, Job, Lora, copy_weights
from pipeline.train.tune import train_arms

VERSION = 1
"""Of results, to be raised by a change of the method or of a default that changes what arms come to: those of an older version
are not gone on from."""

SETTINGS = Path(__file__).parent / "study.yaml"
QUICK = {
    "search": {"samples": 16},
    "train": {"steps": 8, "batch_size": 8, "evaluations": 2, "seeds": [0]},
    "compare": {"inits": ["base", "mashup", "paper"]},
    "target": {"validation_rows": 16, "test_rows": 50},
}
MACHINE_KEYS = {
    "search": ("actors", "cpus_per_actor", "gpus_per_actor", "adapters_per_batch", "memory_cache_gb", "disk_cache_gb", "store"),
    "train": ("seeds", "workers", "min_workers", "cpus_per_worker", "gpus_per_worker", "tokens_per_pass"),
    "compare": ("inits",),
}
"""Settings that do not change what an arm comes to, and those that the table's rows tell apart."""

TRAINING_FILE = "training.json"
"""Written last into a donor's folder: how it was trained."""

DEMO_ROWS = {"train": 400, "test": 200}

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
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path(".cache/study"),
    results: Annotated[
        Path | None, typer.Option(help="Folder of the table; by default benchmarks/results/<settings>, with --quick in --work.")
    ] = None,
) -> None:
    """Run the study; the last line is a JSON object."""
    asked: Row = yaml.safe_load(settings.read_text())
    if quick:
        asked = asked | {name: asked.get(name, {}) | given for name, given in QUICK.items()}
        asked["train"]["learning_rates"] = asked["train"]["learning_rates"][-1:]
    work = work.resolve()
    results = results or (work / "results" if quick else RESULTS / settings.stem)
    targets = _targets(tasks, asked.get("reported", "test")) if tasks else _demo_targets(work)
    study = Study(asked, base or str(base_model()), pool or ("" if tasks else "examples/pool"), targets, work)
    names = [name for name in targets if not only or name in only][: 2 if quick else None]
    for name in names:
        if study.run(name, results / FILE):
            typer.echo(f"{name} is in {results / FILE}", err=True)
    print(write_tables(results))
    print(json.dumps(conclude(results / FILE, names)))


class Study:
    """What is asked of all tasks, with the pool once it is there."""

    def __init__(self, asked: Row, base: str, pool: str, targets: dict[str, Row], work: Path) -> None:
        """
        Args:
            pool: empty: donors are trained on the tasks.
        """
        self.asked, self.pool, self.targets, self.work = {**asked, "base": base}, pool, targets, work
        self.donor, self.families = Lora(**asked["donor"]), asked.get("families", [])
        run_keys = {key: value for key, value in self.asked.items() if key not in ("donor", "families", "reported")}
        self.configs = {name: _config(run_keys, work / name, target) for name, target in targets.items()}
        self._pool_digest = (
            _pool_digest(pool) if pool else digest(asked["donor"], [_files_digest(one) for one in targets.values()])
        )

    def run(self, task: str, file: Path) -> bool:
        """Run what the table lacks of a task and add it. Gives whether anything lacked."""
        config = self.configs[task]
        wanted = {
            "base": _short(config.base),
            "task": task,
            "settings": settings_digest(self.asked),
            "inputs": self._inputs(task),
        }
        missing = lacking(read_arms(file), wanted, config.compare.inits, config.train.seeds)
        for inits, seeds in missing.items():
            update = {
                "pool": self._pool(),
                "exclude": _own(task),
                "compare": config.compare.model_copy(update={"inits": inits}),
                "train": config.train.model_copy(update={"seeds": tuple(seeds)}),
            }
            one = config.model_copy(update=update)
            summary = run_all(one)
            add_arms(file, arms_of(one, summary, {**wanted, "kin": self._has_kin(task, one)}))
        return bool(missing)

    def _inputs(self, task: str) -> str:
        return digest(fingerprint(self.configs[task].base), self._pool_digest, _files_digest(self.targets[task]))

    def _pool(self) -> str:
        """Where the donors are; those that are trained on the tasks are trained now, where they are not yet."""
        pool = self.pool or self._train_donors()
        return str(Path(pool).resolve()) if Path(pool).exists() else pool

    def _has_kin(self, task: str, config: Config) -> bool:
        """Whether an adapter that may be a donor is of the task's family."""
        catalogue = Folder.at(config.run).read_table("catalogue.parquet")
        names = catalogue.filter(pc.equal(catalogue["status"], "ok"))["adapter_id"].to_pylist()
        patterns = [pattern for pattern in self.families if fnmatchcase(task, pattern)]
        return any(fnmatchcase(Path(name).name, pattern) for name in names for pattern in patterns)

    def _train_donors(self) -> str:
        """A pool of one donor a task, trained from the base like the arms of a comparison; validation picks its learning rate."""
        connect()
        for seed, (task, config) in enumerate(self.configs.items(), start=1000):
            donor, place = Folder.at(self.work / "pool" / task), Folder.at(self.work / "donors" / task)
            if donor.exists(TRAINING_FILE):
                continue
            if not place.exists("data/test.parquet"):
                for split, table in take_samples(config).training.items():
                    place.write_table(f"data/{split}.parquet", table)
            key = digest(config.base, config.train.model_dump(), self.donor)[:8]
            arms = [Arm("base", rate, seed) for rate in config.train.learning_rates]
            jobs = [Job(arm, config.base, self.donor, config.train, place.sub("data"), place, key) for arm in arms]
            outcomes = train_arms(jobs, place.sub("train"), lambda text: typer.echo(text, err=True), place.uri)
            best = min(outcomes, key=lambda outcome: min(point["eval_nll"] for point in outcome["curve"]))
            copy_weights(place.sub("train", *best["checkpoint"].split("/")), donor)
            donor.write_json(TRAINING_FILE, {"task": task, "lr": best["lr"], "seed": seed, "best_step": best["best_step"]})
        return str(self.work / "pool")


def settings_digest(asked: Row) -> str:
    """Digest of what all tasks are asked alike, and that changes what an arm comes to."""
    kept = {key: value for key, value in asked.items() if key not in ("base", "families")}
    for section, names in MACHINE_KEYS.items():
        kept[section] = {key: value for key, value in kept.get(section, {}).items() if key not in names}
    return digest(VERSION, kept)[:8]


def arms_of(config: Config, summary: Row, named: Row) -> list[StudyArm]:
    """The rows of a run that is done: each arm, and without a rate each start that was asked for and that there is not.

    Args:
        named: base, task, settings, inputs and kin.
    """
    folder = Folder.at(config.run)
    shared = named | {
        "verdict": summary["verdict"],
        "recipe": summary["recipe"] or "",
        "donors": " ".join(summary["donors"]),
        "overhead_seconds": summary["overhead_seconds"]["total"],
        "charged_seconds": charged_seconds(folder),
        "test_rows": len(Parts(folder, "data/test.parquet")),
        "machine": ", ".join(map(str, yaml.safe_load(folder.read_text("config.yaml"))["machine"].values())),
    }
    curves: dict[tuple[str, float, int], list[Row]] = {}
    for row in folder.read_table("comparison.parquet").to_pylist():
        curves.setdefault((row["init"], row["lr"], row["seed"]), []).append(row)
    arms = [
        StudyArm(init=init, lr=lr, seed=seed, **shared, **_measured(init, lr, seed, rows, summary))
        for (init, lr, seed), rows in curves.items()
    ]
    there = {(arm.init, arm.seed) for arm in arms}
    absent = [(init, seed) for seed in config.train.seeds for init in config.compare.inits if (init, seed) not in there]
    return arms + [StudyArm(init=init, seed=seed, **shared) for init, seed in absent]


def charged_seconds(folder: Folder) -> float | None:
    """What the paper charges for finding donors: the shortest evaluation of a single donor on the search sample, and the merge.

    Donors share engines and batches here, so that one donor's evaluation is the engine's start and its share of the time spent
    scoring; of the merge stage the scoring of merges is left out. None: every score was there.
    """
    stages = folder.read_json("stages.json")
    search, merge = stages["search"]["details"], stages["merge"]
    if not search.get("adapter_samples"):
        return None
    samples = len(split_of(folder.read_table("samples.parquet"), "search"))
    scoring = search["scoring_seconds"] / search["adapter_samples"] * samples
    merging = merge["seconds"] - merge["details"].get("race_seconds", 0.0)
    return float(search["engine_start_seconds"] + scoring + max(0.0, merging))


def conclude(file: Path, names: Sequence[str]) -> Row:
    """What the tasks of a table say together, of those that are named, on every base."""
    tasks = [task for task in tasks_of(current(read_arms(file))[0]) if task.name in names]
    steps = [task.of("mashup") for task in tasks]
    found: Row = {
        "tasks": len({task.name for task in tasks}),
        "without_kin": len({task.name for task in tasks if not task.kin}),
        "mashups": sum(task.verdict == "mashup" for task in tasks),
        "parity_reached": sum(one is not None and one.parity is not None for one in steps),
    }
    for name, values in {"steps_saved": saved(tasks, "steps"), "seconds_saved": saved(tasks, "seconds")}.items():
        found[name] = round(sum(values) / len(values) / 100, 3)
    for rival in dict.fromkeys(init for task in tasks for init in task.starts if init != "mashup"):
        for _, metric in METRICS:
            if values := differences(tasks, rival, metric):
                means, name = over_tasks(values), metric if rival == "base" else f"{metric}_over_{rival}"
                interval = [round(means.low, 2), round(means.high, 2)]
                found |= {name: round(means.mean, 2), f"{name}_interval": interval, f"{name}_p": round(means.p, 3)}
    return found | {"worse_than_base": [task.name for task in tasks if task.worse]}


def _config(asked: Row, run: Path, target: Row) -> Config:
    """What one run is asked; the steps of so many epochs where these are given."""
    epochs = asked.get("epochs")
    content = {key: value for key, value in asked.items() if key != "epochs"}
    content |= {"run": str(run), "pool": "-", "target": asked.get("target", {}) | target}
    if epochs is not None:
        rows = len(Path(target["train"]).read_text().splitlines())
        content["train"] = asked["train"] | {"steps": math.ceil(epochs * rows / asked["train"]["batch_size"])}
    return build_config(content, run.name)


def _targets(folders: Sequence[Path], reported: str) -> dict[str, Row]:
    """Task name -> data files of a config; `reported`: the split that the file beside train.jsonl is, the other comes out of
    train."""
    found: dict[str, Row] = {}
    for train in (file for folder in folders for file in sorted(folder.glob("*/train.jsonl"))):
        other = next((file for name in ("test", "validation") if (file := train.parent / f"{name}.jsonl").exists()), None)
        if other is None:
            raise InputError(f"{train.parent}: no test.jsonl and no validation.jsonl; the study needs one to report on")
        found[train.parent.name] = {"train": str(train), reported: str(other)}
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


def _measured(init: str, lr: float, seed: int, rows: Sequence[Row], summary: Row) -> Row:
    """An arm's curves, and its figures on the test split where its rate was chosen."""
    found, ordered = summary["inits"][init], sorted(rows, key=lambda row: row["step"])
    curves = {
        "steps": "step",
        "seconds": "seconds",
        "validation_nll": "eval_nll",
        "validation_token_accuracy": "eval_token_accuracy",
        "validation_exact_match": "eval_exact_match",
    }
    measured = {name: tuple(float(row[column]) for row in ordered) for name, column in curves.items()}
    tested = found["test_by_seed"][found["seeds"].index(seed)] if lr == found["lr"] else {}
    return {**measured, **tested, "start_seconds": found.get("start_seconds")}


def _short(base: str) -> str:
    """What the table calls a base: a folder's name, or its name on the Hub."""
    return Path(base).name if Path(base).is_dir() else name_of(base)


def _pool_digest(pool: str) -> str:
    """Of the files of a folder of adapters; of another pool its name."""
    files = sorted(file for file in Path(pool).rglob("*") if file.suffix in (".safetensors", ".json", ".bin"))
    return digest([[str(file.relative_to(pool)), _sha256(file)] for file in files] or pool)


def _files_digest(target: Row) -> str:
    return digest({split: _sha256(Path(file)) for split, file in target.items()})


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    typer.run(main)
