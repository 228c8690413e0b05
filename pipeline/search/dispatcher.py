"""The dispatcher: the actor beside the driver in which races are run. It feeds the stream, and takes in what engines report.

Races follow each other; engines wait in it for the next batch, from one race to the next. While a race goes on nothing in it
waits for the store: known scores are read before a race opens, new ones written behind it, and those of other runs looked for
every few seconds.
"""

import asyncio
import logging
from contextlib import suppress

import pyarrow as pa

from pipeline.core.errors import one_line
from pipeline.core.tables import SCORES
from pipeline.search.batch import Begun, Report
from pipeline.search.race import Schedule
from pipeline.search.score_store import News
from pipeline.search.score_writer import ScoreWriter
from pipeline.search.scoreboard import RaceProgress, Scoreboard, Work

IN_FLIGHT = 3
"""Batches that an engine has at hand: one that it scores, one that it reads, and the next."""

NEWS = 5.0
"""Seconds between two looks at what other runs have scored."""

RECLAIM = 1.0
"""Seconds between two looks for work that engines have had for too long (`scoreboard.LEASE`)."""

STORE_PATIENCE = 60.0
"""Seconds that the end of a race waits for a store that does not answer."""


class _OpenRace:
    """A race with its way to the store and back."""

    def __init__(self, number: int, work: Work, schedule: Schedule, seconds: float | None, together: int) -> None:
        self.together = together
        self.news = News(work.store, work.samples)  # before the scores are read, so that none is missed
        self.board = Scoreboard(work, schedule, seconds, number)
        self.writer = ScoreWriter(work.store, work.hashes, work.failures)

    def take_news(self) -> pa.Table | None:
        """What other runs have scored since; None: it cannot be had now, and is only a saving."""
        try:
            return self.news.take(self.writer.files)
        except Exception as error:  # whatever others have put there
            logging.getLogger(__name__).warning("what other runs have scored cannot be read: %s", one_line(error))
            return None


class Dispatcher:
    """Runs as a Ray actor; knows no Ray itself."""

    def __init__(self) -> None:
        self._race: _OpenRace | None = None
        self._engines = set[str]()
        self._fault: str | None = None
        self._closed = False
        self._changed = asyncio.Condition()

    async def open(self, number: int, asked: tuple[Work, Schedule, float | None, int]) -> None:
        """Begin a race, as the next one. The driver does so again where the dispatcher's process died and started anew.

        Args:
            asked: the race's work and schedule, the seconds that it may take from the first engine that is up, and how many
                adapters an engine scores together.
        """
        opened = await asyncio.to_thread(_OpenRace, number, *asked)
        if self._engines:
            opened.board.engine_up(len(self._engines), 0.0)
        await self._change_to(opened)
        self._following = asyncio.create_task(self._follow_store(opened))  # asyncio itself keeps no task alive

    async def next_batch(self) -> pa.Table | None:
        """The next block of the stream; waits until there is one. None: the stream ends."""
        async with self._changed:
            while not self._closed:
                if (
                    self._race
                    and self._has_room(self._race.board)
                    and (batch := self._race.board.next_batch(self._race.together))
                ):
                    return batch.to_block()
                try:
                    await asyncio.wait_for(self._changed.wait(), RECLAIM)
                except TimeoutError:
                    if self._race:
                        self._race.board.reclaim(self._engines)
        return None

    async def work(self) -> Work | None:
        """What an engine that starts is to be proved on; waits for a race. None: there is none to come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._race or self._closed)
            return None if self._closed or not self._race else self._race.board.work

    async def engine_up(self, engine: str, startup: float) -> None:
        """An engine can score; it took so many seconds to start."""
        async with self._changed:
            self._engines.add(engine)
            if self._race:
                self._race.board.engine_up(len(self._engines), startup)
            self._changed.notify_all()
        await self._take_news(self._race)

    async def refuse(self, fault: str) -> None:
        """An engine has not proved itself; it says why."""
        async with self._changed:
            self._fault = fault
            self._changed.notify_all()

    async def begin(self, engine: str, race: int, number: str) -> Begun:
        """An engine begins a batch."""
        async with self._changed:
            if not (opened := self._of(race)):
                return Begun([], [])
            if engine not in self._engines:  # a dispatcher that started anew knows of none
                self._engines.add(engine)
                opened.board.engine_up(len(self._engines), 0.0)
            wanted, failures = opened.board.begin(engine, number)
            opened.writer.add(SCORES.empty_table(), failures)
            self._changed.notify_all()
            return Begun(wanted, opened.board.stopped(engine))

    async def report(self, report: Report) -> None:
        """What an engine made of a batch."""
        async with self._changed:
            if opened := self._of(report.race):
                opened.board.report(report)
                opened.writer.add(report.scores, report.failures)
                self._changed.notify_all()

    async def progress(self, race: int, wait: float = 0.0) -> RaceProgress | None:
        """How far a race is; waits up to so many seconds for its end. None: it is not open, as this process is a new one.

        Raises:
            Exception: its scores cannot be written.
        """
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(self._is_settled), wait)
            if not (opened := self._of(race)):
                return None
        if opened.board.is_over:
            await asyncio.to_thread(opened.writer.flush, STORE_PATIENCE)
        opened.writer.require_sound()
        progress = opened.board.progress()
        progress.adapter_samples, progress.fault = opened.writer.written, self._fault
        return progress

    async def close(self) -> None:
        """End the stream: engines finish what they have and go."""
        self._closed = True
        await self._change_to(None)

    def _of(self, race: int) -> _OpenRace | None:
        return self._race if self._race and self._race.board.number == race else None

    def _is_settled(self) -> bool:
        return bool(self._fault) or not self._race or self._race.board.is_over

    def _has_room(self, board: Scoreboard) -> bool:
        """Whether more work may go out: what waits in the stream is bound to an engine before its turn has come."""
        return board.batches_out < IN_FLIGHT * max(1, len(self._engines))

    async def _change_to(self, race: _OpenRace | None) -> None:
        """Open a race, or none, and let the one that was open go, its scores written."""
        async with self._changed:
            ended, self._race = self._race, race
            self._changed.notify_all()
        if ended:
            try:
                await asyncio.to_thread(ended.writer.flush, STORE_PATIENCE)
            except Exception as error:  # who waited for the end of that race was told
                logging.getLogger(__name__).warning("scores are lost, and made again: %s", one_line(error))
            ended.writer.close()

    async def _follow_store(self, opened: _OpenRace) -> None:
        while self._race is opened and not opened.board.is_over:
            await asyncio.sleep(NEWS)
            await self._take_news(opened)

    async def _take_news(self, opened: _OpenRace | None) -> None:
        news = await asyncio.to_thread(opened.take_news) if opened and not opened.board.is_over else None
        if opened and news is not None and len(news):
            async with self._changed:
                opened.board.learn(news)
                self._changed.notify_all()
