"""A refresh as a job: what a scheduler starts every night to keep the mashups of many targets up to date.

    python -m jobs.refresh CONFIG.yaml [--exit-code]

The last line says what came of each target; see `jobs/entry.py`:

    {"status": "done", "exit_code": 0, "targets": {"law": {"outcome": "published", ...}, "sport": {"outcome": "nothing to do"}}}

With --exit-code a refresh that had nothing to do ends with 3, not 0.
"""

from typing import Any

from jobs.entry import arguments, run_job


def refresh(config: str, report_noop: bool) -> dict[str, Any]:
    """Bring every target up to date, going on where an earlier attempt stopped."""
    from pipeline.refresh.refresh import load_refresh, refresh

    return refresh(load_refresh(config), report_noop)


def main() -> None:
    asked = arguments(__doc__, exit_code="end with 3 where there was nothing to do")
    run_job(lambda: refresh(asked.config, asked.exit_code))


if __name__ == "__main__":
    main()
