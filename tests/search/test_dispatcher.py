"""The dispatcher without Ray: what it hands out to whom, and that nothing in it waits for the store."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from store_server import StoreServer

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.search import dispatcher as dispatcher_module
from pipeline.search import scoreboard
from pipeline.search.batch import Batch, Report, candidates_table
from pipeline.search.dispatcher import IN_FLIGHT, Dispatcher
from pipeline.search.race import Schedule
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import RaceProgress, Work

EVERYTHING = Schedule((4,), None, 1.0)


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Work]:
    def make(count: int, store: str = "store") -> Work:
        names = [f"a{n:02}" for n in range(count)]
        columns = [["base", *names], [None, *names], [f"hash-{name}" for name in ("base", *names)]]
        candidates = candidates_table(*columns)
        samples = pa.table({"sample_id": [f"s{n}" for n in range(4)], "completion_mask": [[False, True, True]] * 4})
        scores = ScoreStore.at(store if "://" in store else str(tmp_path / store), "base", "vllm", "float32")
        return Work(candidates, samples, scores, Folder.at(tmp_path / "failures"))

    return make


@pytest.fixture
def report(drawn_scores: Callable[..., pa.Table]) -> Callable[[Batch], Report]:
    def make(batch: Batch) -> Report:
        scores = drawn_scores(batch.candidates["adapter_id"].to_pylist(), batch.samples["sample_id"].to_pylist())
        return Report(batch.race, batch.number, scores)

    return make


async def next_batch(dispatcher: Dispatcher) -> Batch | None:
    """What it hands out, where there is something now."""
    try:
        block = await asyncio.wait_for(dispatcher.next_batch(), 0.05)
    except TimeoutError:
        return None
    return None if block is None else Batch.from_block(block)


async def finish(dispatcher: Dispatcher, report: Callable[[Batch], Report]) -> int:
    """Do all work that it has. How many adapters that were."""
    done = 0
    while batch := await next_batch(dispatcher):
        done += len(batch.candidates)
        begun = await dispatcher.begin("one", batch.race, batch.number)
        assert begun.wanted.equals(batch.candidates)
        await dispatcher.report(report(batch))
    return done


async def progress(dispatcher: Dispatcher, race: int) -> RaceProgress:
    (found,) = await dispatcher.progress([race])
    assert found is not None
    return found


def test_races_follow_each_other_and_their_scores_are_in_the_store_when_they_are_over(
    work: Callable[..., Work], report: Callable[[Batch], Report]
) -> None:
    async def scenario() -> None:
        dispatcher, first, second = Dispatcher(), work(4), work(1, "another-store")
        assert await next_batch(dispatcher) is None
        await dispatcher.open([1], (first, EVERYTHING, None, 2))
        await dispatcher.engine_up("one", 2.0)
        assert await finish(dispatcher, report) == 5
        over = await progress(dispatcher, 1)
        assert (over.seen, over.adapter_samples, over.engines, over.startup) == ([4] * 5, 20, 1, 2.0)
        assert 1 <= len(first.store.files()) <= 2  # the first scores at once, the others behind them
        await dispatcher.open([2], (second, EVERYTHING, None, 2))
        assert await dispatcher.progress([1]) == [None]
        assert await finish(dispatcher, report) == 2
        over = await progress(dispatcher, 2)
        assert (over.seen, over.adapter_samples, over.engines, over.startup) == ([4] * 2, 8, 1, 0)
        await dispatcher.close()
        assert await dispatcher.next_batch() is None

    asyncio.run(scenario())


def test_work_that_no_engine_has_room_for_stays_with_the_race(
    work: Callable[..., Work], report: Callable[[Batch], Report]
) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher()
        await dispatcher.open([1], (work(20), EVERYTHING, None, 2))
        out = [await next_batch(dispatcher) for _ in range(IN_FLIGHT)]
        assert all(out)
        assert await next_batch(dispatcher) is None
        await dispatcher.engine_up("one", 0.0)
        assert await next_batch(dispatcher) is None
        await dispatcher.engine_up("two", 0.0)
        assert all([await next_batch(dispatcher) for _ in range(IN_FLIGHT)])
        assert await next_batch(dispatcher) is None
        assert out[0]
        await dispatcher.report(report(out[0]))
        assert await next_batch(dispatcher)

    asyncio.run(scenario())


def test_a_batch_of_an_earlier_race_or_process_is_passed_over(
    work: Callable[..., Work], report: Callable[[Batch], Report]
) -> None:
    """A dispatcher that starts anew learns of its engines by what they begin."""

    async def scenario() -> None:
        before = Dispatcher()
        await before.open([1], (work(2), EVERYTHING, None, 2))
        batch = await next_batch(before)
        assert batch
        anew = Dispatcher()
        assert not len((await anew.begin("one", 1, batch.number)).wanted)
        await anew.report(report(batch))
        assert await anew.progress([1]) == [None]
        await anew.open([2], (work(2), EVERYTHING, None, 2))
        assert not len((await anew.begin("one", 1, batch.number)).wanted)
        await anew.report(report(batch))
        assert await finish(anew, report) == 3
        assert (await progress(anew, 2)).engines == 1

    asyncio.run(scenario())


def test_what_another_run_scores_meanwhile_is_found(
    work: Callable[..., Work], report: Callable[[Batch], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "NEWS", 0.1)

    async def scenario() -> None:
        dispatcher, asked = Dispatcher(), work(3)
        await dispatcher.open([1], (asked, EVERYTHING, None, 2))
        base = await next_batch(dispatcher)
        assert base
        other = Batch(1, "other", "search", False, asked.candidates.slice(1, 2), asked.samples)
        asked.store.write(report(other).scores, asked.hashes)
        await asyncio.sleep(0.5)
        assert (await dispatcher.begin("one", 1, base.number)).wanted["adapter_id"].to_pylist() == ["base"]
        await dispatcher.report(report(base))
        batch = await next_batch(dispatcher)
        assert batch
        assert batch.candidates["adapter_id"].to_pylist() == ["a02"]
        await dispatcher.report(report(batch))
        assert (await progress(dispatcher, 1)).adapter_samples == 8

    asyncio.run(scenario())


def test_work_that_is_held_too_long_goes_to_an_engine_that_has_nothing_to_do(
    work: Callable[..., Work], report: Callable[[Batch], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is at work for another race has something to do."""
    monkeypatch.setattr(dispatcher_module, "RECLAIM", 0.01)
    monkeypatch.setattr(scoreboard, "LEASE", 0.0)

    async def scenario() -> None:
        dispatcher, first, second = Dispatcher(), work(0), work(0, "another-store")
        await dispatcher.open([1, 2], (first, EVERYTHING, None, 2), (second, EVERYTHING, None, 2))
        for engine in ("slow", "quick"):
            await dispatcher.engine_up(engine, 0.0)
            batch = await next_batch(dispatcher)
            assert batch
            await dispatcher.begin(engine, batch.race, batch.number)
        assert await next_batch(dispatcher) is None
        await dispatcher.report(report(batch))
        again = await next_batch(dispatcher)
        assert again
        assert again.race == 1

    asyncio.run(scenario())


def test_races_side_by_side_score_an_adapter_for_each_while_an_engine_has_it(
    work: Callable[..., Work], report: Callable[[Batch], Report]
) -> None:
    """Two engines; of two races over one pool, the second scores it in the opposite order."""

    async def scenario() -> None:
        dispatcher, first, second = Dispatcher(), work(8), work(8, "another-store")
        order = pa.array([0, *range(8, 0, -1)])
        second = replace(second, candidates=second.candidates.take(order))
        rungs = Schedule((2, 4), None, 1.0, keep=8)
        await dispatcher.open([1, 2], (first, rungs, None, 2), (second, rungs, None, 2))
        last: dict[str, list[str]] = {"one": [], "two": []}
        loads, engines = 0, itertools.cycle(last)
        for engine in last:
            await dispatcher.engine_up(engine, 0.0)
        while batch := await next_batch(dispatcher):
            engine = next(engines)
            begun = await dispatcher.begin(engine, batch.race, batch.number)
            names = [name for name in begun.wanted["adapter_id"].to_pylist() if name != "base"]
            loads += len(set(names) - set(last[engine]))
            last[engine] = names or last[engine]
            await dispatcher.report(report(replace(batch, candidates=begun.wanted)))
        assert loads <= 8 * 2 + 2  # each rung, and where one begins
        found = await dispatcher.progress([1, 2])
        assert all(one and one.over and one.adapter_samples == 36 for one in found)

    asyncio.run(scenario())


@pytest.mark.parametrize("beside", [False, True])
def test_what_a_race_drops_is_let_go_where_no_other_race_wants_it(
    work: Callable[..., Work], report: Callable[[Batch], Report], beside: bool
) -> None:
    async def scenario() -> None:
        dispatcher, halving = Dispatcher(), Schedule((2, 4), 18, 1.0, keep=2)
        await dispatcher.engine_up("one", 0.0)
        slow = (work(4), EVERYTHING, None, 1)
        await dispatcher.open([1, 2][: 1 + beside], (work(4, "another-store"), halving, None, 8), *[slow] * beside)
        stopped = list[str]()
        while not all(one and one.over for one in await dispatcher.progress([1])):
            batch = await next_batch(dispatcher)
            assert batch
            begun = await dispatcher.begin("one", batch.race, batch.number)
            stopped += begun.stopped
            await dispatcher.report(report(replace(batch, candidates=begun.wanted)))
        assert len(stopped) == (0 if beside else 2)

    asyncio.run(scenario())


def test_a_store_that_does_not_answer_stops_nothing_before_the_end(
    work: Callable[..., Work], report: Callable[[Batch], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All work is handed out and taken in; the race is over once its scores are written."""
    monkeypatch.setattr(dispatcher_module, "NEWS", 0.05)
    answers = asyncio.Event()
    right = {name: getattr(Folder, name) for name in ("write_table", "list_files")}

    def asked(name: str) -> Any:
        def ask(*args: Any) -> Any:
            if not answers.is_set():
                raise OSError("AWS Error SLOW_DOWN")
            return right[name](*args)

        return ask

    async def scenario() -> None:
        dispatcher = Dispatcher()
        await dispatcher.open([1], (work(4), EVERYTHING, None, 2))
        for name in right:
            monkeypatch.setattr(Folder, name, asked(name))
        assert await finish(dispatcher, report) == 5
        over = asyncio.create_task(progress(dispatcher, 1))
        await asyncio.sleep(0.3)
        assert not over.done()
        answers.set()
        found = await over
        assert (found.over, found.adapter_samples) == (True, 20)

    asyncio.run(scenario())


def test_a_race_of_a_thousand_adapters_asks_the_store_for_nothing_of_its_own(
    work: Callable[..., Work],
    report: Callable[[Batch], Report],
    bucket: str,
    store_server: StoreServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it is open: a listing now and then, and a request a file of scores; none of these files is read."""
    monkeypatch.setattr(dispatcher_module, "NEWS", 0.2)
    asked: list[str] = []

    async def scenario() -> int:
        dispatcher, thousand = Dispatcher(), work(1000, f"{bucket}/store")
        await dispatcher.open([1], (thousand, EVERYTHING, None, 50))
        store_server.requests.clear()
        for engine in map(str, range(64)):
            await dispatcher.engine_up(engine, 0.0)
        while batch := await next_batch(dispatcher):
            await dispatcher.begin("1", batch.race, batch.number)
            await dispatcher.report(report(batch))
            await asyncio.sleep(0.05)
        assert (await progress(dispatcher, 1)).adapter_samples == 4 * 1001
        asked.extend(store_server.requests)
        await dispatcher.close()
        return len(thousand.store.files())

    files = asyncio.run(scenario())
    listings = [request for request in asked if "list-type=2" in request]
    writes = [request for request in asked if request.startswith("PUT ")]
    assert listings
    assert len(writes) == files
    assert len(asked) == len(listings) + files
    assert len(asked) < 100  # of 1,001 adapters in more than 60 batches, with 64 engines


def test_whoever_waits_for_a_race_is_told_at_its_end(work: Callable[..., Work], report: Callable[[Batch], Report]) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher()
        await dispatcher.open([1], (work(1), EVERYTHING, None, 2))
        waiting = asyncio.create_task(dispatcher.progress([1], wait=60))
        assert await finish(dispatcher, report) == 2
        (found,) = await asyncio.wait_for(waiting, 10)
        assert found is not None
        assert found.over

    asyncio.run(scenario())


def test_an_engine_may_be_up_before_the_first_race_which_is_told_what_it_took(
    work: Callable[..., Work], report: Callable[[Batch], Report]
) -> None:
    async def scenario() -> None:
        dispatcher, expected, asked = Dispatcher(), work(0), work(1)
        await dispatcher.expect(expected)
        assert await dispatcher.work() is expected
        await dispatcher.engine_up("one", 2.0)
        assert await next_batch(dispatcher) is None
        for race, startup in ((1, 2.0), (2, 0.0)):
            await dispatcher.open([race], (asked, EVERYTHING, None, 2))
            assert await dispatcher.work() is asked
            await finish(dispatcher, report)
            found = await progress(dispatcher, race)
            assert (found.over, found.engines, found.startup) == (True, 1, startup)

    asyncio.run(scenario())


def test_an_engine_that_refuses_is_told_of(work: Callable[..., Work]) -> None:
    fault = InputError("it cannot serve the base")

    async def scenario() -> None:
        dispatcher = Dispatcher()
        assert not asyncio.create_task(dispatcher.work()).done()
        asked = work(1)
        await dispatcher.open([1], (asked, EVERYTHING, None, 2))
        assert await dispatcher.work() is asked
        await dispatcher.refuse(fault)
        assert (await progress(dispatcher, 1)).fault is fault

    asyncio.run(scenario())
