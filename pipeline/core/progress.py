"""What a person sees while a run works: one calm line now and then, on standard error."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

INTERVAL, AGAIN = 3.0, 30.0
"""Seconds between two lines of the same counter, and before a line is repeated."""

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


THRIFTY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that spin while they wait take the CPUs from whatever else works there: beside one other process the small products of
a merge took twenty times as long."""


def quiet_libraries() -> None:
    """To be called before torch, transformers or Ray are imported: their notes would bury the progress, and their threads
    take the machine. What the user set stays."""
    for name, value in (QUIET | THRIFTY).items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it tells each process of a faster package


def exit_when_stopped() -> None:
    """From now on a SIGTERM raises SystemExit in the main thread, as it does under Ray, so that what is at work can put down
    where it is."""
    signal.signal(signal.SIGTERM, _exit)
    sys.unraisablehook = _stop_all_the_same
    atexit.register(_end_here)  # before Ray registers what ends it, and so called after that


def end_stopped(code: int) -> NoReturn:
    """End this process, of which threads of Ray may be at work: once all is put down and Ray has ended, without the interpreter's
    own end, which such a thread can crash. The exit code would then be a signal's."""
    _ends_with.append(code)
    sys.exit(code)


_ends_with: list[int] = []


def _end_here() -> None:
    if _ends_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_ends_with[-1])


def _stop_all_the_same(ignored: Any) -> None:
    """Python lets no exception out of the callbacks of weak references and the like. A signal that came while one ran would be
    lost: it comes once more."""
    number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(ignored.exc_type)
    if number is None or sys.is_finalizing():
        sys.__unraisablehook__(ignored)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _exit(number: int, frame: FrameType | None) -> None:
    signal.alarm(0)  # Ray's: three seconds after a SIGTERM it would abort the process
    sys.exit(number)


def got_on() -> None:
    """Note that what this process works on made a step; see `standstill`."""
    global _step
    _step = time.monotonic()


def standstill() -> float:
    """Seconds since this process last made a step. A lock is held by who makes some: see `pipeline/core/lock.py`."""
    return time.monotonic() - _step


_step = time.monotonic()


class Progress:
    """Prints lines with the seconds since the command began. A line that says something new is a step; the same one again is
    none, so that work that hangs while it is looked at again and again is known by it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._last, self._text = 0.0, ""
        self._stage, self._said = "", ""
        self.about = ""
        """What the lines are about, where those of several runs come side by side."""

    def stage(self, name: str) -> None:
        self._stage, self._last, self._text = name, 0.0, ""

    def say(self, text: str) -> None:
        if text != self._said:
            got_on()
            self._said = text
        self._console.print(f"[dim]{time.monotonic() - self._began:6.0f} s[/dim]  [bold]{self._stage:<8}[/bold] ", end="")
        self._console.print(f"{self.about}: {text}" if self.about else text, markup=False)

    def now_and_then(self, text: str, force: bool = False) -> None:
        """Say something that changes now and then: at most every few seconds, and the same again only after a while."""
        now = time.monotonic()
        since = now - self._last
        if force or since >= (AGAIN if text == self._text else INTERVAL):
            self._last, self._text = now, text
            self.say(text)

    def count(self, done: int, total: int, text: str) -> None:
        """Say how far a long piece of work is: at most every few seconds, and at its end."""
        self.now_and_then(f"{done} of {total} {text}", force=done >= total)
