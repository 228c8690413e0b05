"""The whole method as a job: everything that `mashup run` does.

    python -m jobs.mashup CONFIG.yaml [--run RUN]

The last line has the headline of the run's summary.json; see `jobs/entry.py`.
"""

from typing import Any

from jobs.entry import arguments, run_job

HEADLINE = ("verdict", "why", "donors", "recipe", "parity", "adapter")


def mashup(config: str, run: str | None) -> dict[str, Any]:
    """Run all stages, going on where an earlier attempt stopped."""
    from pipeline.config import load_config
    from pipeline.run import run_all
    from pipeline.storage import Folder

    asked = load_config(config, run=run)
    summary = run_all(asked)
    folder = Folder.at(asked.run)
    return {"run": folder.uri, **{name: summary[name] for name in HEADLINE}, "report": folder.sub("report.html").uri}


def main() -> None:
    asked = arguments(__doc__)
    run_job(lambda: mashup(asked.config, asked.run))


if __name__ == "__main__":
    main()
