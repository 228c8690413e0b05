"""The commands for a notebook: `api.run` does what `mashup run` does, and the others read what a run found.

Quick to import: torch and Ray come with the first run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline.config import Config, build_config, load_config
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder


def run(config: str | Path | Mapping[str, Any] | Config, until: Literal["merge"] | None = None) -> str:
    """Run all stages, or those up to the merge; go on where an earlier attempt stopped.

    Args:
        config: a config file, or a dictionary of its keys.

    Returns:
        The run's folder, which the other functions take.

    Raises:
        InputError: something that is asked is not right; the message says what.
    """
    asked = _config(config)
    from pipeline.run import find_start, run_all

    find_start(asked) if until else run_all(asked)
    return Folder.at(asked.run).uri


def leaderboard(run: str | Path) -> pa.Table:
    """The pool, the best donor first: a row for each adapter that was scored, and one for the base."""
    return _found(run, "leaderboard.parquet").read_table("leaderboard.parquet")


def mashup(run: str | Path) -> str | None:
    """The folder of the mashup; None where the base is the better start."""
    folder = _found(run, "selection.json")
    return folder.sub("mashup").uri if folder.read_json("selection.json")["verdict"] == "mashup" else None


def summary(run: str | Path) -> dict[str, Any]:
    """What the comparison of the starts found, as in summary.json."""
    return dict(_found(run, "summary.json").read_json("summary.json"))


def _config(given: str | Path | Mapping[str, Any] | Config) -> Config:
    if isinstance(given, Config):
        return given
    return build_config(dict(given), "config") if isinstance(given, Mapping) else load_config(str(given))


def _found(run: str | Path, file: str) -> Folder:
    """The folder of a run that came so far."""
    folder = Folder.at(str(run))
    if not folder.exists(file):
        raise InputError(f"{folder.uri}: {file} is not there (yet); `mashup show` says how far a run is")
    return folder
