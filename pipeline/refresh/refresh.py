"""Scheduled runs: `mashup refresh REFRESH.yaml` keeps the mashups of many targets up to date.

    look      files of pool, targets and base, settings -> what changed since the last time
    renew     for each target where something did: search what is new, select, merge   -> runs/<target>/
    publish   where the selection changed, or its gain passes the threshold            -> published/<target>/
    finetune  where `train` is given, once the engines have gone: from what was chosen -> published/<target>/
    history   a row for each of these targets, and a page                              -> history.parquet, history.html
    status    how it went, for alerts, also where there was nothing to do              -> status.json, metrics.prom

One refresh of a home at a time. Where nothing changed, neither Ray nor torch is even imported.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.adapters.pool import pool_state
from pipeline.config import Config, MergeConfig, SearchConfig, TargetConfig, TrackConfig, TrainConfig, build_config
from pipeline.core.base_ref import pinned
from pipeline.core.errors import InputError, one_line
from pipeline.core.hub_api import pinned_data
from pipeline.core.ledger import digest
from pipeline.core.lock import Lock, LockLostError
from pipeline.core.progress import Progress
from pipeline.core.settings import Section, checked, read_yaml, with_settings
from pipeline.core.storage import Folder, lies_in
from pipeline.refresh.history import FAILURES, History, Seen
from pipeline.refresh.status import NOTHING_TO_DO, Status, last_success, note

EXIT_CODES = {"done": 0, NOTHING_TO_DO: 0, "failed": 1, "wrong input": 2}
NOTHING_CODE = 3
"""Of a refresh that had nothing to do, for who asks."""

HOME_FOLDERS = ("published", "runs", "index", "store", "lock")

REPORTED = ("outcome", "changed", "verdict", "donors", "nll_minus_base", "adapter_samples", "mashup", "finetuned", "reason")
"""What a refresh gives back of a target: columns of the history, and where its finetuned weights are."""


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("names a folder: letters, digits, '.', '_' and '-' alone, no dot in front")
    return name


class RefreshConfig(Section):
    """What a refresh keeps up to date."""

    home: str = Field(description="folder of everything that refreshes leave: a local path or s3://...")
    base: str = Field(description="as of a run, like all that follows")
    pool: str
    exclude: tuple[str, ...] = ()
    checkpoints: Literal["leave_out", "include"] = "leave_out"
    targets: dict[Annotated[str, AfterValidator(_file_name)], TargetConfig] = Field(min_length=1)
    search: SearchConfig = SearchConfig()
    merge: MergeConfig = MergeConfig()
    train: TrainConfig = Field(
        TrainConfig(), description="where it is given, what was chosen is finetuned and published beside the mashup"
    )
    track: TrackConfig = TrackConfig()
    threshold: float = Field(
        0.01,
        ge=0,
        description="of unchanged donors, other weights are published only if the hold-out loss falls by so many nats a token",
    )

    @field_validator("pool")
    @classmethod
    def home_lies_elsewhere(cls, value: str, info: ValidationInfo) -> str:
        home = info.data.get("home")
        if home and lies_in(home, value):
            raise ValueError(f"home {home} lies in the pool, so that its mashups would become donors; choose another home")
        ours = [f"{home.partition('?')[0]}/{name}" for name in HOME_FOLDERS] if home else []
        if path := next((path for path in ours if lies_in(value, path)), None):
            raise ValueError(f"{value} lies in {path}, where refreshes write; choose another pool")
        return value

    @model_validator(mode="after")
    def curves_are_of_a_training(self) -> "RefreshConfig":
        if "track" in self.model_fields_set and not self.finetunes:
            raise ValueError("track: there is nothing to track without a training; give train, too")
        return self

    @property
    def finetunes(self) -> bool:
        return "train" in self.model_fields_set

    def run_of(self, target: str) -> Config:
        """A target's run. All share one store of scores; what is trained starts from the mashup, or the base where that is
        better."""
        home = Folder.at(self.home)
        search = self.search.model_copy(update={"store": self.search.store or home.sub("store").uri})
        paths = {"run": home.sub("runs", target).uri, "base": self.base, "pool": self.pool}
        pool = {"exclude": self.exclude, "checkpoints": self.checkpoints}
        training = {"train": self.train, "track": self.track, "compare": {"inits": ["mashup"]}}
        content = {**paths, **pool, "target": self.targets[target], "search": search, "merge": self.merge, **training}
        return build_config(content, f"the run of target {target}")


def load_refresh(path: str, settings: Sequence[str] = ()) -> RefreshConfig:
    """Read the config file of a refresh; `settings`, as of `with_settings`, replace values of it.

    Raises:
        InputError: as `load_config`.
    """
    content = with_settings(read_yaml(path, "home, base, pool and targets"), settings)
    config = checked(RefreshConfig, content, path)
    for target in config.targets:
        config.run_of(target)
    return config


def refresh(config: RefreshConfig, report_noop: bool = False) -> dict[str, Any]:
    """Refresh every target for which something changed; one that fails does not stop the others.

    Args:
        report_noop: give `exit_code` NOTHING_CODE, not 0, where there was nothing to do.

    Returns:
        `status` and `exit_code`, and under `targets` what came of each.

    Raises:
        InputError: home, base or pool are not right.
        LockTakenError: another refresh of this home is at work.
        LockLostError: this process slept, or hung, for so long that another one may be.
    """
    home = Folder.at(config.home)
    home.create()
    with Lock(home.sub("lock"), say=Progress().say) as lock:
        config = config.model_copy(update={"base": pinned(config.base)})  # once, for the index and all targets
        history = History.of(home)
        looked = look(config)
        due = {name: changed for name, seen in looked.items() if (changed := history.changed(name, seen)) is not None}
        rows = _renew_all(config, history, lock, due, looked) if due else {}
        noted = note(home, {name: rows[name]["outcome"] if name in rows else NOTHING_TO_DO for name in looked})
        if rows:
            _tell(home, noted)
    status = _status([row["outcome"] for row in rows.values()])
    code = NOTHING_CODE if report_noop and status == NOTHING_TO_DO else EXIT_CODES[status]
    untouched = {"outcome": NOTHING_TO_DO}
    reported = {name: {key: row[key] for key in REPORTED if row.get(key) is not None} for name, row in rows.items()}
    return {"status": status, "exit_code": code, "targets": {name: reported.get(name, untouched) for name in looked}}


def look(config: RefreshConfig) -> dict[str, Seen]:
    """Digests of what each target's mashup depends on, by the names, sizes and times of files; none is read.

    Raises:
        InputError: the base model is not known.
    """
    adapters, base = digest(pool_state(config.pool)), digest(_base_state(config.base))
    trained = [config.train.model_dump()] if config.finetunes else []
    asked = (config.search.model_dump(), config.merge.model_dump(), config.threshold, config.exclude, config.checkpoints)
    settings = digest(*asked, *trained)
    return {
        name: {"adapters": adapters, "data": digest(_data_state(target)), "base": base, "settings": settings}
        for name, target in config.targets.items()
    }


def _data_state(target: TargetConfig) -> list[Any]:
    """The files of a target's data. Of what cannot be looked at, that it cannot: its run then says why, and stops no other."""
    try:
        return [target.model_dump(), *(Folder.at(pinned_data(path)).state() for path in target.paths.values())]
    except (InputError, OSError) as error:
        return [target.model_dump(), type(error).__name__]


def _base_state(base: str) -> list[Any]:
    return Folder.at(base).state() if Path(base).expanduser().is_dir() else [pinned(base)]


def _renew_all(
    config: RefreshConfig, history: History, lock: Lock, due: dict[str, list[str]], looked: dict[str, Seen]
) -> dict[str, dict[str, Any]]:
    """Renew the targets that are due, and put down what came of each at once. Gives rows of the history."""
    from pipeline.refresh.history_page import write_history
    from pipeline.refresh.target import Target, index_pool, search_side_by_side  # this brings torch and Ray
    from pipeline.search.engine_pool import Engines
    from pipeline.train import tracking

    tracking.check(config.track)
    progress, rows = Progress(), dict[str, dict[str, Any]]()
    pool = index_pool(config.run_of(next(iter(due))), history.home.sub("index"))
    engines, targets = Engines(config.search), {name: Target(config.run_of(name), pool, config.finetunes) for name in due}
    published = {name: history.home.sub("published", name) for name in due}
    try:
        with engines.kept():
            if len(targets) > 1 and not config.search.budget.seconds:  # of which each has its own
                search_side_by_side(targets, engines)
            for name, changed in due.items():
                progress.stage(name)
                progress.say(f"changed: {', '.join(changed)}" if changed else "failed the last time")
                found = _tried(partial(targets[name].renew, engines, published[name], config.threshold, lock.check))
                rows[name] = found | {"target": name, "changed": changed, "seen": looked[name]}
                if not _trains(config, rows[name]):
                    _put_down(history, lock, rows[name])
        for name in [name for name, row in rows.items() if _trains(config, row)]:
            progress.stage(f"{name}: finetune")
            found = _tried(partial(targets[name].finetune, published[name], lock.check))
            rows[name] |= found | {"seconds": rows[name]["seconds"] + found["seconds"]}
            _put_down(history, lock, rows[name])
    finally:  # who is stopped leaves a page of what was done
        lock.check()
        write_history(history.home)
    return rows


def _trains(config: RefreshConfig, row: dict[str, Any]) -> bool:
    """Whether a target that was renewed is to be finetuned."""
    return config.finetunes and row["outcome"] not in FAILURES


def _put_down(history: History, lock: Lock, row: dict[str, Any]) -> None:
    lock.check()
    history.add(row)
    Progress().say(f"{row['outcome']}: {row['reason']}" if "reason" in row else row["outcome"])


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What came of some work for one target. What fails, but for a lock that is lost, is kept as the reason."""
    started = time.perf_counter()
    try:
        found = work()
    except LockLostError:
        raise
    except InputError as error:
        found = {"outcome": "wrong input", "reason": str(error)}
    except Exception as error:  # the next target may do
        if os.environ.get("MASHUP_TRACEBACK"):
            raise
        found = {"outcome": "failed", "reason": one_line(error)}
    return found | {"time": datetime.now(UTC), "seconds": time.perf_counter() - started}


def _tell(home: Folder, noted: Status) -> None:
    from pipeline.cluster.telemetry import tell_refresh  # this brings Ray

    for name, found in noted.items():
        tell_refresh(home.uri, name, last_success(found), found["outcomes"])


def _status(outcomes: list[str]) -> str:
    failures = {outcome for outcome in outcomes if outcome in FAILURES}
    if failures:
        return "wrong input" if failures == {"wrong input"} else "failed"
    return "done" if outcomes else NOTHING_TO_DO
