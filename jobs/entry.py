"""How a job ends: with an exit code and, as its last line, one JSON object that a scheduler can read.

    {"status": "done", "exit_code": 0, ...what the job found}
    {"status": "failed", "exit_code": 1, "error": "..."}       the same job goes on from there
    {"status": "wrong input", "exit_code": 2, "error": "..."}
    {"status": "stopped", "exit_code": 1, ...}                 by `ray job stop`, or a scheduler's SIGTERM; likewise

Ray itself reports exit code 1 for every job that did not end with 0: who needs to tell them apart reads the last line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.core.errors import InputError, one_line
from pipeline.core.progress import end_stopped, exit_when_stopped, quiet_libraries

RUN = "folder of the run, in place of the config's"


def arguments(about: str | None, **options: str) -> argparse.Namespace:
    """What a job is called with: `config`, the path of a config file, and the options that it takes, by their names.

    Args:
        about: the job's docstring.
        options: name of a flag -> its help. `run` is no flag, but a folder in place of the config's.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    for name, text in options.items():
        kind: dict[str, Any] = {} if name == "run" else {"action": "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)
    return parser.parse_args()


def run_job(work: Callable[[], dict[str, Any]]) -> NoReturn:
    """Do the work, print its result as the last line and exit. `work` may give an exit code of its own as `exit_code`."""
    exit_when_stopped()
    quiet_libraries()
    ending: dict[str, Any] = {"status": "done", "exit_code": 0}
    try:
        ending |= work()
    except InputError as error:
        ending = {"status": "wrong input", "exit_code": 2, "error": str(error)}
    except (SystemExit, KeyboardInterrupt):
        ending = {"status": "stopped", "exit_code": 1, "error": "stopped; the same job goes on from here"}
    except Exception as error:  # the last line of defence: one line for a scheduler, the traceback on demand
        if os.environ.get("MASHUP_TRACEBACK"):
            raise
        ending = {"status": "failed", "exit_code": 1, "error": one_line(error)}
    print(json.dumps(ending), flush=True)
    if ending["status"] == "stopped":
        end_stopped(ending["exit_code"])
    sys.exit(ending["exit_code"])
