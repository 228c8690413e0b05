"""The whole method as a job: everything that `mashup run` does.

    python -m jobs.mashup CONFIG.yaml [--run RUN] [--plan | --until-merge]

The last line has the headline of the run's summary.json; with --plan what the run would do and cost; with --until-merge the
verdict and the adapter to start from. See `jobs/entry.py`.
"""

from typing import Any

from jobs.entry import RUN, arguments, run_job

HEADLINE = ("verdict", "why", "donors", "recipe", "parity", "adapter")


def mashup(config: str, run: str | None) -> dict[str, Any]:
    """Run all stages, going on where an earlier attempt stopped."""
    from pipeline.config import load_config

    asked = load_config(config, run=run)  # before what brings torch and Ray: a mistake in it is said at once
    from pipeline.core.storage import Folder
    from pipeline.run import run_all

    summary = run_all(asked)
    folder = Folder.at(asked.run)
    return {"run": folder.uri, **{name: summary[name] for name in HEADLINE}, "report": folder.sub("report.html").uri}


def plan(config: str, run: str | None) -> dict[str, Any]:
    """Only say what the run would do and cost."""
    from pipeline.config import load_config

    asked = load_config(config, run=run)
    from pipeline.run import plan_run

    return {"run": asked.run, "plan": plan_run(asked)}


def until_merge(config: str, run: str | None) -> dict[str, Any]:
    """Find and merge donors, and train nothing."""
    from pipeline.config import load_config

    asked = load_config(config, run=run)
    from pipeline.core.storage import Folder
    from pipeline.run import find_start

    selection, folder = find_start(asked), Folder.at(asked.run)
    adapter = folder.sub("mashup").uri if selection["verdict"] == "mashup" else None
    return {"run": folder.uri, **{name: selection[name] for name in ("verdict", "donors")}, "adapter": adapter}


def main() -> None:
    about = {"plan": "only say what the run would do and cost", "until_merge": "find and merge donors, and train nothing"}
    asked = arguments(__doc__, run=RUN, **about)
    work = plan if asked.plan else until_merge if asked.until_merge else mashup
    run_job(lambda: work(asked.config, asked.run))


if __name__ == "__main__":
    main()
