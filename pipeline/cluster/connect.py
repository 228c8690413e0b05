"""Joins a Ray cluster, or starts one on this machine: soon, or with the reason why not. Notices when the head is gone."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from pipeline.core.errors import InputError

START_ATTEMPTS = 3
"""To start Ray on this machine."""

ANSWER_SECONDS = 5.0
"""In which a head accepts a connection; Ray itself tries for minutes without a word."""

POLL = 2.0
"""Seconds between two looks at the head."""

RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's setting: seconds without the head after which Ray ends a process."""

TOKEN_HINT = "where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def connect() -> float:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; with a cluster at hand, do nothing.

    Returns:
        Seconds that it took.

    Raises:
        ConnectionError: nothing answers at RAY_ADDRESS.
        InputError: the cluster there cannot be joined, such as for want of its token.
    """
    started = time.perf_counter()
    if not ray.is_initialized():
        _quiet()
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
        else:
            start()
        _have_time_to_stop()
    set_data_context()
    return time.perf_counter() - started


def is_own() -> bool:
    """Whether the cluster at hand is one that this process started, and nobody else works in it."""
    return not os.environ.get("RAY_ADDRESS")


def set_data_context() -> None:
    """How Ray Data works for us: without a word, and reading Parquet by the tasks that read everything else. Ray's newer reader
    begins each read with 32 actors for the files' footers, each a process of its own."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False


def _have_time_to_stop() -> None:
    """Leave a SIGTERM to its Python handler. The one that Ray installs below it aborts the process three seconds later, whatever
    that is putting down: absl's failure signal handler sets an alarm."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _join(address: str) -> None:
    """Join the cluster that RAY_ADDRESS names.

    Raises:
        ConnectionError: nothing answers there, or what does is starting or dying.
        InputError: what answers asks for a token, and has not got it.
    """
    require_answer(address)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, AuthenticationError) as error:
        ray.shutdown()
        reason = str(error).partition("\n")[0].partition(". ")[0]
        told = f"RAY_ADDRESS={address}: cannot join the Ray cluster there ({reason})"
        if not _wants_token(error):  # it may be up again soon; that is no fault of the user's
            raise ConnectionError(told) from error
        raise InputError(f"{told}; {TOKEN_HINT}") from error
    if not address.startswith("ray://"):  # Ray's own client looks after its head
        threading.Thread(target=_watch_head, args=(ray.get_runtime_context().gcs_address,), daemon=True).start()


def _wants_token(error: BaseException) -> bool:
    """Ray says so by the kind of the error, or in the text of the one that it came from."""
    return AuthenticationError.__name__ in f"{error!r} {error.__cause__!r} {error.__context__!r}"


def start(**settings: Any) -> None:
    """Start a cluster on this machine, with Ray's own settings. It is tried again: on a busy machine some of Ray's processes may
    come too late for the others, which then give up."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address="local", log_to_driver=False, logging_level="ERROR", **settings)
            return
        except Exception:  # Ray raises no narrower one
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise


def _quiet() -> None:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    for name in ("ray", "ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and said once


def require_answer(address: str) -> None:
    """See to it that something answers at `address`: host:port, or ray://host:port.

    Raises:
        ConnectionError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto` and the like, which Ray looks up on this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address} ({error.strerror or error})") from error


def _watch_head(address: str) -> None:
    """End this process with a line once the head has been away for too long. Ray would soon end it, too, but without one."""
    patience = 0.75 * float(os.environ.get(RECONNECT, "60"))
    seen = time.monotonic()
    while ray.is_initialized():
        try:
            require_answer(address)
            seen = time.monotonic()
        except ConnectionError as error:
            away = time.monotonic() - seen
            if away > patience:
                print(f"mashup: {error} for {away:.0f} s; the same command goes on from here", file=sys.stderr, flush=True)
                os._exit(1)
        time.sleep(POLL)
