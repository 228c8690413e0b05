"""Bring mashups up to date, as a cluster's scheduler runs it: `python -m jobs.refresh REFRESH.yaml [--exit-code]`.

The config file is that of `mashup refresh`. The last line says what came of each target:

    {"status": "done", "exit_code": 0, "targets": {"law": {"outcome": "published", ...}, "sport": {"outcome": "nothing to do"}}}

With --exit-code a refresh that had nothing to do ends with 3, not 0.
"""

import argparse

from jobs.entry import run_job
from pipeline.refresh import load_refresh, refresh


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.refresh", description="Bring the mashups of many targets up to date.")
    parser.add_argument("config", metavar="REFRESH.yaml")
    parser.add_argument("--exit-code", action="store_true", help="end with 3 where there was nothing to do")
    asked = parser.parse_args()
    run_job(lambda: refresh(load_refresh(asked.config), asked.exit_code))


if __name__ == "__main__":
    main()
