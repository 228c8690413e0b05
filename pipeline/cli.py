"""The command `mashup`: a subcommand for each stage, and `mashup run CONFIG.yaml` for all of them.

What is asked is read before `pipeline.run` is imported, which brings torch and Ray: a mistake in it is said at once.

Exit codes: 0 done; 1 failed while working, the same command goes on from there; 2 the input is wrong; 3 nothing to do (only
`mashup refresh --exit-code`).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline import __version__
from pipeline.core.errors import InputError, one_line
from pipeline.core.progress import end_stopped, exit_when_stopped, quiet_libraries

app = typer.Typer(
    help="Start a finetune from what was trained before: find donors, merge them, finetune, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[str, typer.Option("--run", help="Folder of the run: a local path or s3://...")]
Base = Annotated[str, typer.Option(help="Base model: a Hub id, a local folder or s3://...")]
Pool = Annotated[str, typer.Option(help="Adapters: a folder, a list file, s3://... or hf://...")]

PLAN = (
    "Estimate work and cost, and write plan.json. Index and samples are made, and kept. If no earlier run measured this "
    "cluster's speed, a short calibration scores and trains a little; nothing else is scored, merged or trained."
)


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A value in place of the config's, as in train.steps=50.")
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mashup {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Start a finetune from what was trained before: find donors, merge them, finetune, compare."""


@app.command()
def init(
    base: Base,
    pool: Pool,
    target: Annotated[str, typer.Option(help="The target's train split; see docs/data.md.")],
    run: Annotated[str, typer.Option("--run", help="Folder of the run.")] = "run",
    file: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The file to write.")] = "config.yaml",
) -> None:
    """Write a config file for a task, with every other key and its default as a comment."""
    from pipeline.config_template import template

    _config(run, base, pool, {"train": target})
    if Path(file).exists():
        raise InputError(f"{file}: this file is there already; name another one, or remove it")
    Path(file).write_text(template({"run": run, "base": base, "pool": pool, "target": {"train": target}}))
    typer.echo(f"{file}; next: mashup samples {file}, mashup run {file} --plan, mashup run {file}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    from pipeline.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run: a local path or s3://...")],
    as_json: Annotated[bool, typer.Option("--json", help="For a machine.")] = False,
) -> None:
    """Print how far a run is and what it found."""
    folder = _open(run).folder
    from pipeline.report.terminal import found_so_far, run_table

    found = found_so_far(folder)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(run_table(folder, found))


@app.command()
def index(base: Base, pool: Pool, run: RunFolder) -> None:
    """Check every adapter of a pool against the base model and write the catalogue."""
    config = _config(run, base, pool, {"train": "-"})
    from pipeline import run as page

    with page.Run(config).locked() as this:
        page.index(this)


@app.command()
def samples(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Config file of a run.")],
    show: Annotated[int, typer.Option(help="How many rows.", min=1)] = 3,
    settings: Settings = None,
) -> None:
    """Show the first rows of a target as they are understood, and in colour (or [[ ]]) what is learned of them."""
    from pipeline.config import load_config

    asked = load_config(config, settings or ())
    from pipeline.data.show import MARKS, show_rows

    console = Console(highlight=False)
    for row in show_rows(asked, show, ("", "") if console.color_system and not console.no_color else MARKS):
        console.print(row, soft_wrap=True)


@app.command()
def search(
    base: Base,
    pool: Pool,
    target: Annotated[str, typer.Option(help="The target's train split: JSONL, Parquet or a datasets folder.")],
    run: RunFolder,
    samples: Annotated[int, typer.Option(help="Rows to score every candidate on, hold-out included.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    budget: Annotated[float, typer.Option(help="Share of the cost of scoring everything that may be spent.")] = 0.1,
) -> None:
    """Score every adapter of a pool on a sample of the target and print the leaderboard."""
    asked = {"samples": samples, "seed": seed, "engine": engine, "budget": budget}
    config = _config(run, base, pool, {"train": target}, search=asked)
    from pipeline import run as page
    from pipeline.report.terminal import leaderboard_table

    Console().print(leaderboard_table(page.run_search(config).read_table("leaderboard.parquet")))


@app.command()
def merge(run: RunFolder) -> None:
    """Choose donors on the hold-out samples and merge them into one adapter, or say that the base is the better start."""
    this = _open(run)
    from pipeline import run as page

    with this.locked():
        page.merge_donors(this)


@app.command()
def train(
    run: RunFolder,
    init: Annotated[str | None, typer.Option(help="base or mashup; by default what the selection chose.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the first of the config.")] = None,
    seed: Annotated[int | None, typer.Option(help="By default the first of the config.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Leave a trace of some steps for ui.perfetto.dev.")] = False,
) -> None:
    """Finetune one arm and print the folder of its best checkpoint."""
    if init not in (None, "base", "mashup"):
        raise InputError(f"--init {init}: must be base or mashup")
    this = _open(run)
    from pipeline import run as page

    with this.locked():
        typer.echo(page.train(this, init, lr, seed, profile))


@app.command()
def compare(run: RunFolder) -> None:
    """Finetune every init at every learning rate and seed, and compare them at the same budget."""
    this = _open(run)
    from pipeline import run as page

    with this.locked():
        page.compare(this)
    _print_summary(this.folder)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html from whatever the run has, and print its path."""
    this = _open(run)
    from pipeline import run as page

    typer.echo(page.report(this))


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run: a local path or s3://...")],
    to: Annotated[str, typer.Option(help="Repository: ORG/NAME. It is made where it is missing.")],
    weights: Annotated[str | None, typer.Option(help="mashup or finetuned; by default finetuned, where there are such.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's id on the Hub, where the run had a copy of it elsewhere.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
) -> None:
    """Upload the mashup or the finetuned weights to the Hugging Face Hub, with a card. Prints the URL."""
    if weights not in (None, "mashup", "finetuned"):
        raise InputError(f"--weights {weights}: must be mashup or finetuned")
    this = _open(run)
    from pipeline.report.push import push

    typer.echo(push(this, to, weights, base, private))


@app.command("run")
def run_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Config file of the run; see docs/configuration.md.")],
    run: Annotated[str | None, typer.Option("--run", help="Folder of the run, in place of the config's.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help=PLAN)] = False,
    until: Annotated[str | None, typer.Option(help="merge: find and merge donors, and train nothing.")] = None,
    settings: Settings = None,
) -> None:
    """Run all stages; go on where an earlier attempt stopped. Prints the result and the path of the report."""
    from pipeline.config import load_config

    if until not in (None, "merge"):
        raise InputError(f"--until {until}: must be merge")
    asked = load_config(config, settings or (), run=run)
    from pipeline import run as page
    from pipeline.core.storage import Folder
    from pipeline.report.terminal import plan_table, start_table

    if plan:
        Console().print(plan_table(page.plan_run(asked)))
        return
    folder = Folder.at(asked.run)
    if until:
        Console().print(start_table(page.find_start(asked), folder), soft_wrap=True)
    else:
        page.run_all(asked)
        _print_summary(folder)
    typer.echo(f"{folder.uri}/report.html")


@app.command("refresh")
def refresh_command(
    config: Annotated[str, typer.Argument(metavar="REFRESH.yaml", help="Which targets to keep up to date; see docs/cluster.md.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 3 where there was nothing to do.")] = False,
    settings: Settings = None,
) -> None:
    """Bring the mashups of many targets up to date: score what is new, publish what is better. Prints what came of each."""
    from pipeline.refresh.refresh import load_refresh, refresh

    found = refresh(load_refresh(config, settings or ()), exit_code)
    for target, came in found["targets"].items():
        typer.echo(": ".join([target, *(came[key] for key in ("outcome", "reason", "mashup", "finetuned") if key in came)]))
    raise typer.Exit(found["exit_code"])


@app.command()
def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The job's config, its paths absolute or URIs.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Of the job: --plan, --exit-code.")] = None,
    job: Annotated[str, typer.Option(help="mashup, search or refresh.")] = "mashup",
    address: Annotated[str | None, typer.Option(help="Ray's job server; by default what Ray's own variables name.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Folder of the run, in place of the config's.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    settings: Settings = None,
) -> None:
    """Run a job on a Ray cluster, follow its log and print its result. Ends with the job's own exit code."""
    from pipeline.submit import submit_job

    raise typer.Exit(submit_job(config, job, address, run, options or (), wait, settings or ()))


def main() -> None:
    """Run the command line with the exit codes of this module's docstring."""
    quiet_libraries()
    exit_when_stopped()
    try:
        app(standalone_mode=True)
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here", 1)
    except SystemExit as ending:
        if ending.code == signal.SIGTERM:
            _say("stopped; the same command goes on from here")
            end_stopped(1)
        raise
    except Exception as error:  # the last line of defence: one line for the user, the traceback on demand
        if os.environ.get("MASHUP_TRACEBACK"):
            raise
        _fail(f"{one_line(error)} (the same command goes on from here; MASHUP_TRACEBACK=1 shows more)", 1)


def _config(run: str, base: str, pool: str, target: dict[str, Any], **sections: Any) -> Any:
    from pipeline.config import build_config

    return build_config({"run": run, "base": base, "pool": pool, "target": target, **sections}, "options")


def _open(run: str) -> Any:
    from pipeline.run_folder import Run

    return Run.open(run)


def _print_summary(folder: Any) -> None:
    from pipeline.report.terminal import summary_table

    Console().print(summary_table(folder.read_json("summary.json"), folder.read_json("selection.json")))


def _fail(message: str, code: int) -> None:
    _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"mashup: {message}", style="red", markup=False)


if __name__ == "__main__":
    main()
