"""The dispatcher: the actor beside the driver in which races are run. It feeds the stream, and takes in what engines report.

Races follow each other; engines wait in it for the next batch, from one race to the next. Those of several targets over one
pool run side by side: an engine that has an adapter scores it for each of them before it lets it go. While a race goes on nothing
in it waits for the store: known scores are read before a race opens, new ones written behind it, and those of other runs looked
for every few seconds.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa

from pipeline.core.errors import InputError, one_line
from pipeline.core.tables import SCORES
from pipeline.search.batch import NOTHING, Batch, Begun, Report
from pipeline.search.race import Schedule
from pipeline.search.score_store import News
from pipeline.search.score_writer import ScoreWriter
from pipeline.search.scoreboard import HeldBy, RaceProgress, Scoreboard, Work

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

    def __init__(self, number: int, held: HeldBy, work: Work, schedule: Schedule, seconds: float | None, together: int) -> None:
        self.together = together
        self.news = News(work.store, work.samples)  # before the scores are read, so that none is missed
        self.board = Scoreboard(work, schedule, seconds, number, held)
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
        self._races: dict[int, _OpenRace] = {}
        self._following: list[asyncio.Task[None]] = []
        self._engines, self._startup = set[str](), 0.0
        self._expected: Work | None = None
        self._held, self._given = HeldBy(), 0
        self._fault: Exception | None = None
        self._closed = False
        self._changed = asyncio.Condition()

    async def open(self, numbers: Sequence[int], *asked: tuple[Work, Schedule, float | None, int]) -> None:
        """Begin races, in place of those that are open. The driver does so again where the dispatcher's process died and started
        anew.

        Args:
            numbers: of the races.
            asked: of each race its work and schedule, the seconds that it may take from the first engine that is up, and how
                many adapters an engine scores together.
        """
        opening = (asyncio.to_thread(_OpenRace, number, self._held, *one) for number, one in zip(numbers, asked, strict=True))
        opened = await asyncio.gather(*opening)
        if self._engines:
            for one in opened:
                one.board.engine_up(len(self._engines), self._startup)
            self._startup = 0.0
        await self._change_to(opened)
        self._following = [asyncio.create_task(self._follow_store(one)) for one in opened]  # asyncio itself keeps no task alive

    async def expect(self, work: Work) -> None:
        """There will be a race: an engine that starts before it is open proves itself on these samples."""
        async with self._changed:
            self._expected = work
            self._changed.notify_all()

    async def next_batch(self) -> pa.Table | None:
        """The next block of the stream; waits until there is one. None: the stream ends."""
        async with self._changed:
            while not self._closed:
                if self._has_room() and (batch := self._next_of_races()):
                    return batch.to_block()
                try:
                    await asyncio.wait_for(self._changed.wait(), RECLAIM)
                except TimeoutError:
                    self._reclaim()
        return None

    async def work(self) -> Work | None:
        """What an engine that starts is to be proved on; waits for a race, or until one is expected. None: there is none to
        come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._races or self._expected or self._closed)
            if self._closed:
                return None
            return next((one.board.work for one in self._races.values()), self._expected)

    async def engine_up(self, engine: str, startup: float) -> None:
        """An engine can score; it took so many seconds to start."""
        async with self._changed:
            self._add_engine(engine, startup)
            self._changed.notify_all()

    async def refuse(self, fault: Exception) -> None:
        """An engine has not proved itself, or cannot serve the base; it says why."""
        async with self._changed:
            self._fault = fault
            self._changed.notify_all()

    async def begin(self, engine: str, race: int, number: str) -> Begun:
        """An engine begins a batch."""
        async with self._changed:
            if not (opened := self._races.get(race)):
                return NOTHING
            if engine not in self._engines:  # a dispatcher that started anew knows of none
                self._add_engine(engine, 0.0)
            wanted, failures = opened.board.begin(engine, number)
            opened.writer.add(SCORES.empty_table(), failures)
            self._changed.notify_all()
            return Begun(wanted, self._stopped(opened, engine))

    async def report(self, report: Report) -> None:
        """What an engine made of a batch."""
        async with self._changed:
            if opened := self._races.get(report.race):
                try:
                    opened.board.report(report)
                except InputError as fault:  # it does not tell what the race ranks by
                    self._fault = fault
                opened.writer.add(report.scores, report.failures)
                self._changed.notify_all()

    async def progress(self, races: Sequence[int], wait: float = 0.0) -> list[RaceProgress | None]:
        """How far races are; waits up to so many seconds for the end of all. None: one is not open, as this process is a new one.

        Raises:
            Exception: the scores of one cannot be written.
        """
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: all(map(self._is_settled, races))), wait)
            opened = [self._races.get(race) for race in races]
        return [await self._progress_of(one) if one else None for one in opened]

    async def _progress_of(self, opened: _OpenRace) -> RaceProgress:
        if opened.board.is_over:
            await asyncio.to_thread(opened.writer.flush, STORE_PATIENCE)
        opened.writer.require_sound()
        progress = opened.board.progress()
        progress.adapter_samples, progress.fault = opened.writer.written, self._fault
        return progress

    async def close(self) -> None:
        """End the stream: engines finish what they have and go."""
        self._closed = True
        await self._change_to([])

    def _add_engine(self, engine: str, startup: float) -> None:
        self._engines.add(engine)
        if not self._races:
            self._startup += startup  # which the first race is told
        for one in self._races.values():
            one.board.engine_up(len(self._engines), startup)

    def _is_settled(self, race: int) -> bool:
        opened = self._races.get(race)
        return bool(self._fault) or not opened or opened.board.is_over

    def _has_room(self) -> bool:
        """Whether more work may go out: what waits in the stream is bound to an engine before its turn has come."""
        out = sum(one.board.batches_out for one in self._races.values())
        return out < IN_FLIGHT * max(1, len(self._engines))

    def _next_of_races(self) -> Batch | None:
        """A batch of the first race that has one. Each race has its turn for as many batches as there are engines: whoever scores
        adapters for one race can go on with them for the next."""
        for number, one in [*self._races.items()]:
            if batch := one.board.next_batch(one.together):
                self._given += 1
                if self._given % max(1, len(self._engines)) == 0:
                    self._races[number] = self._races.pop(number)
                return batch
        return None

    def _stopped(self, opened: _OpenRace, engine: str) -> list[str]:
        """URIs of adapters that no open race will score again, and of which a race has not told this engine yet."""
        stopped = opened.board.stopped(engine)
        others = [one.board.racing() for one in self._races.values() if stopped and one is not opened]
        return [uri for uri in stopped if not any(uri in racing for racing in others)]

    def _reclaim(self) -> None:
        """Take work back from who has had it for too long, where an engine has nothing to do."""
        boards = [one.board for one in self._races.values()]
        if not set().union(*(board.at_work for board in boards)).issuperset(self._engines):
            for board in boards:
                board.reclaim()

    async def _change_to(self, opened: Sequence[_OpenRace]) -> None:
        """Open races, or none, and let those that were open go, their scores written."""
        async with self._changed:
            ended, self._races = [*self._races.values()], {one.board.number: one for one in opened}
            self._changed.notify_all()
        for one in ended:
            try:
                await asyncio.to_thread(one.writer.flush, STORE_PATIENCE)
            except Exception as error:  # who waited for the end of that race was told
                logging.getLogger(__name__).warning("scores are lost, and made again: %s", one_line(error))
            one.writer.close()

    async def _follow_store(self, opened: _OpenRace) -> None:
        while opened.board.number in self._races and not opened.board.is_over:
            await asyncio.sleep(NEWS)
            await self._take_news(opened)

    async def _take_news(self, opened: _OpenRace) -> None:
        news = None if opened.board.is_over else await asyncio.to_thread(opened.take_news)
        if news is not None and len(news):
            async with self._changed:
                opened.board.learn(news)
                self._changed.notify_all()
