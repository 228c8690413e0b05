"""Where scoring engines wait from one race to the next."""

import asyncio
from dataclasses import dataclass
from typing import Any

from pipeline.search.scoreboard import Work


@dataclass(frozen=True)
class OpenRace:
    """What an engine needs for taking part: the work, the scoreboard that shares it out, and the files of the store that it knew
    when it began."""

    work: Work
    board: Any
    files: frozenset[str]


class Lobby:
    """Where engines wait for the next race. Runs as a Ray actor; knows no Ray itself."""

    def __init__(self) -> None:
        self._number, self._race, self._closed = 0, None, False
        self._changed = asyncio.Condition()

    async def call(self, number: int, race: Any) -> None:
        """Call all engines to the race of this number; the first is 1."""
        async with self._changed:
            self._number, self._race = number, race
            self._changed.notify_all()

    async def close(self) -> None:
        """Let the engines go."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def wait(self, number: int) -> tuple[int, Any] | None:
        """The present race with its number, once that is above `number`; None: no further race is to come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._number > number)
            return None if self._closed else (self._number, self._race)
