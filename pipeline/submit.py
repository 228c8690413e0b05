"""`mashup submit`: a job of `jobs/` on a Ray cluster, by way of the cluster's job server.

Our code and the config go with the job, so that the cluster needs only the packages that we depend on. The job's log is followed;
its last line says how it ended, see `jobs/entry.py`. A job's id follows from its run: who submits one that waits or works already
follows it.

Nothing else goes with it: what is sent can be read on the cluster's dashboard. Credentials for object stores and the Hub are the
cluster's: its nodes have them in their environment.
"""

import asyncio
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console, RenderableType

from pipeline.cluster.connect import TOKEN_HINT, require_answer
from pipeline.config import Config
from pipeline.core.errors import InputError, first_line
from pipeline.core.ledger import digest
from pipeline.core.node_folder import temporary_folder
from pipeline.core.settings import checked, read_yaml, with_settings
from pipeline.core.storage import Folder
from pipeline.refresh.refresh import RefreshConfig
from pipeline.report.terminal import leaderboard_table, summary_table

JOBS = ("mashup", "search", "refresh")
CONFIG_FILE = "config.yaml"
LOCAL = "http://127.0.0.1:8265"
PATHS = ("run", "home", "base", "pool", "train", "validation", "test", "store")
"""Keys, in whatever section of a config, that name a file or a folder where they have a text."""

CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers of Ray that tell of each upload and each connection."""

STOP_SECONDS = 30
"""What a job that is stopped has to write its last line before it is killed; Ray's default is three."""

MOST_KEPT = 100_000
"""Characters at the end of a log, which have the job's last line."""

LOST = (OSError, RuntimeError, ClientError)
"""What Ray's client raises where the job server does not answer."""
PATIENCE, POLL, LONGEST_POLL = 60.0, 2.0, 60.0
"""Seconds without an answer after which a job is out of sight, and between two tries: at first, and in the end."""


def submit_job(
    path: str,
    job: str,
    address: str | None = None,
    run: str | None = None,
    options: Sequence[str] = (),
    wait: bool = True,
    settings: Sequence[str] = (),
) -> int:
    """Send a job to a cluster, follow it to its end and print what it found.

    Args:
        path: the config file.
        job: one of JOBS.
        address: of the job server; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or else this machine's.
        run: folder of the run, in place of the config's.
        options: of the job, such as --plan.
        wait: whether to follow it.
        settings: in place of the config's, as of `with_settings`.

    Returns:
        The job's exit code; 1 if it was left running, 0 if that was asked for.

    Raises:
        InputError: the job or the config is not right, or the server wants another token.
        ConnectionError: the server cannot be reached, or not any more.
    """
    if job not in JOBS:
        raise InputError(f"--job {job}: must be {', '.join(JOBS[:-1])} or {JOBS[-1]}")
    config = portable_config(path, job, run, settings)
    client = connect(address)
    number, told = _send_once(client, job, options, config)
    follow, stop = (f"ray job {what} {number} --address {client.get_address()}" for what in ("logs --follow", "stop"))
    say = partial(Console(stderr=True, soft_wrap=True, highlight=False).print, markup=False)
    say(f"job {number} {told}\n  to follow it: {follow}\n  to stop it:   {stop}")
    if not wait:
        return 0
    try:
        ending = _follow(client, number, say)
    except KeyboardInterrupt:
        say(f"\nthe job goes on; to follow it: {follow}; to stop it: {stop}")
        return 1
    except LOST as error:
        raise ConnectionError(f"lost job {number}, which may go on ({first_line(error)}); to follow it: {follow}") from error
    if "error" in ending:
        say(f"mashup: job {number}: {ending['error']}", style="red")
    else:
        Console().print(_result(job, ending))
    return int(ending["exit_code"])


def portable_config(path: str, job: str, run: str | None, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What a job's config file asks, with `run` and `settings` in place of its own; fit for a machine with another working
    folder.

    Raises:
        InputError: a key or value is not right, or a path is relative.
    """
    if job == "refresh" and run:
        raise InputError(f"--run {run}: a refresh has the folders of its runs in its home; leave it out")
    content: dict[str, Any] = read_yaml(path, "run, base, pool and target")
    content = with_settings(content, settings) | ({"run": run} if run else {})
    checked(RefreshConfig if job == "refresh" else Config, content, path)
    for key, value in paths(content):
        if not _travels(value, key == "base"):
            raise InputError(
                f"{path}: {key}: {value} is a relative path, and the cluster's nodes work in other folders; give an absolute one "
                "that all of them see, or s3://..."
            )
    return content


def paths(content: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a config that name a file or a folder, with their sections, and what they name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from paths(value, f"{section}{key}.")
        elif key in PATHS and isinstance(value, str):
            yield f"{section}{key}", value


def connect(address: str | None) -> JobSubmissionClient:
    """The job server at `address`, or else at the one that Ray's own command would take.

    Raises:
        InputError: it wants another token.
        ConnectionError: nothing answers there, or not a job server.
    """
    if address:  # Ray's client would let the variables win
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or LOCAL
    try:
        if "://" not in address:
            require_answer(address)
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        reason = error.message.partition("\n")[0]
        raise InputError(f"{address}: the cluster lets nobody in without its token ({reason}); {TOKEN_HINT}") from error
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{address}: no Ray job server answers there ({first_line(error)}); see --address") from error


def ending_of(log: str, status: JobStatus, message: str | None) -> dict[str, Any]:
    """How a job ended: its last line, or what Ray knows of a job that did not come to write one, or whose log is away."""
    for line in reversed(log.splitlines()):  # what ends after the job may still have written to its log
        if line.startswith('{"status"') and line.endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found
    if status == JobStatus.STOPPED:
        return {"status": "stopped", "exit_code": 1, "error": "stopped; the same job goes on from here"}
    if status == JobStatus.SUCCEEDED:
        return {"status": "done", "exit_code": 0, "note": "its log does not say what it found; the folder of its config has it"}
    lines = (message or "Ray gives no reason").strip().splitlines()
    reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))
    return {"status": "failed", "exit_code": 1, "error": f"wrote no result line: {reason}"}


def _travels(value: str, is_base: bool) -> bool:
    if is_base and not value.startswith((".", "~")) and value.count("/") <= 1:
        return not Path(value).is_dir()  # or else a Hub id
    return "://" in value or value.startswith("/")


def _send_once(client: JobSubmissionClient, job: str, options: Sequence[str], config: Mapping[str, Any]) -> tuple[str, str]:
    """Send a job, unless the same one waits or works: two would only keep each other from the folder. Gives its id, and what to
    say of it. Ray takes no id twice, so that each attempt at a run has a number."""
    place = str(config["home" if job == "refresh" else "run"]).rstrip("/")
    name = f"mashup-{digest(job, place, *options)}"
    known = {one.submission_id: one.status for one in client.list_jobs() if _attempt(name, one.submission_id)}
    at_work = next((number for number, status in known.items() if number and not status.is_terminal()), None)
    there = "was submitted before and has not ended: it is followed, as it was asked then"
    if at_work:
        return at_work, there
    number = f"{name}-{1 + max((_attempt(name, number) for number in known), default=0)}"
    try:
        return _send(client, number, shlex.join(["python", "-m", f"jobs.{job}", CONFIG_FILE, *options]), config), "is submitted"
    except RuntimeError as error:
        if f"{number} already exists" not in str(error):
            raise
        return number, there  # somebody else was faster


def _attempt(name: str, number: str | None) -> int:
    """Which attempt at a run a job is; 0: none."""
    found, _, attempt = (number or "").rpartition("-")
    return int(attempt) if found == name and attempt.isdecimal() else 0


def _send(client: JobSubmissionClient, number: str, command: str, config: Mapping[str, Any]) -> str:
    with temporary_folder() as folder:
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False))
        environment = {
            "working_dir": str(folder),
            "py_modules": [str(Path(__file__).parents[1] / package) for package in ("pipeline", "jobs")],
            "excludes": ["__pycache__"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        }
        return str(client.submit_job(entrypoint=command, runtime_env=environment, submission_id=number))


def _follow(client: JobSubmissionClient, number: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Show a job's log until Ray says that the job is at its end. A stream that breaks off, or that cannot be had at all, says
    nothing of the job: its status does."""
    log, pause, told = _Log(), POLL, False
    while True:
        pause = POLL if log.show(client, number) else min(2 * pause, LONGEST_POLL)
        if ending := _ending(client, number, log):
            return ending
        if pause == LONGEST_POLL and not told:
            say("the log cannot be followed; the job's status is looked at until it ends, and the log tried again")
            told = True
        time.sleep(pause)


def _ending(client: JobSubmissionClient, number: str, log: "_Log") -> dict[str, Any] | None:
    """How a job ended. None: it goes on, or the server does not answer, which it may do again."""
    try:
        info = client.get_job_info(number)
    except LOST:
        if log.is_out_of_sight:
            raise
        return None
    if not info.status.is_terminal():
        log.heard = time.monotonic()
        return None
    try:
        text = client.get_job_logs(number)
    except LOST:  # the node that has it may be gone
        if not log.is_out_of_sight:
            return None
        text = log.end
    return ending_of(text, info.status, info.message)


class _Log:
    """How much of a job's log was shown; a stream begins with the log's first line."""

    def __init__(self) -> None:
        self.shown, self.end, self.heard = 0, "", time.monotonic()

    @property
    def is_out_of_sight(self) -> bool:
        """Whether nothing was heard of the job for too long."""
        return time.monotonic() - self.heard > PATIENCE

    def show(self, client: JobSubmissionClient, number: str) -> bool:
        """Show what is new, until the stream ends. Gives whether that was its end, or at least something came."""
        before = self.shown
        try:
            asyncio.run(self._show(client, number))
        except LOST:
            return self.shown > before
        return True

    async def _show(self, client: JobSubmissionClient, number: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(number):
            new = text[max(0, self.shown - seen) :]
            print(new, end="", file=sys.stderr, flush=True)
            seen += len(text)
            self.shown, self.end, self.heard = max(self.shown, seen), (self.end + new)[-MOST_KEPT:], time.monotonic()


def _result(job: str, ending: Mapping[str, Any]) -> RenderableType:
    """The tables of the run's folder, if it can be read from here; or else what the last line says."""
    found = {name: value for name, value in ending.items() if name not in ("status", "exit_code")}
    try:
        folder = Folder.at(ending["run"])
        if job == "search":
            return leaderboard_table(folder.read_table("leaderboard.parquet"))
        if job == "mashup":
            summary = folder.read_json("summary.json")
            if all(value == summary[name] for name, value in found.items() if name in summary):
                return summary_table(summary, folder.read_json("selection.json"))
    except (KeyError, OSError, ValueError):  # a folder of the cluster's, or a bucket that we may not read
        pass
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
