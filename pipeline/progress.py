"""What a person sees while a run works: one calm line now and then, on standard error."""

import time

from rich.console import Console

INTERVAL = 3.0
"""Seconds between two lines of the same counter."""


class Progress:
    """Prints lines with the seconds since the command began."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._last = 0.0
        self._stage = ""

    def stage(self, name: str) -> None:
        self._stage, self._last = name, 0.0

    def say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began:6.0f} s[/dim]  [bold]{self._stage:<8}[/bold] ", end="")
        self._console.print(text, markup=False)

    def now_and_then(self, text: str, force: bool = False) -> None:
        """Say something that changes all the time: at most every few seconds."""
        now = time.monotonic()
        if force or now - self._last >= INTERVAL:
            self._last = now
            self.say(text)

    def count(self, done: int, total: int, text: str) -> None:
        """Say how far a long piece of work is: at most every few seconds, and at its end."""
        self.now_and_then(f"{done} of {total} {text}", force=done >= total)
