"""The scoreboard without Ray: what it gives out, to whom, and what becomes of work that nobody finishes."""

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core.storage import Folder
from pipeline.engines.scorer import Loaded
from pipeline.search import scoreboard as board_module
from pipeline.search.race import Schedule
from pipeline.search.score_store import ScoreStore, read_failures, record_failures
from pipeline.search.scoreboard import Scoreboard, Work

EVERYTHING = Schedule((4,), None, 1.0)


def work_on(folder: Path, names: list[str]) -> Work:
    columns = [["base", *names], [None, *(f"/pool/{name}" for name in names)], ["base", *names]]
    candidates = pa.table([pa.array(column, pa.string()) for column in columns], names=["adapter_id", "uri", "adapter_hash"])
    samples = pa.table({"sample_id": [f"s{n}" for n in range(4)], "completion_mask": [[False, True, True]] * 4})
    store = ScoreStore.at(str(folder), "base", "vllm", "float32")
    return Work(candidates, samples, store, Folder.at(folder / "failures"))


def losses(job: board_module.ScoringJob) -> dict[int, list[float]]:
    return {candidate: [1.0 + candidate] * len(job.samples) for candidate in job.candidates}


async def finish(board: Scoreboard, engine: str = "one") -> list[list[int]]:
    """Work as an engine until the race is over. The jobs that it got."""
    jobs = []
    while job := await board.take(engine, 2):
        jobs.append(job.candidates)
        await board.report(engine, losses(job), tokens=3)
    return jobs


def test_the_base_goes_alone_and_adapters_in_batches(tmp_path: Path) -> None:
    board = Scoreboard(work_on(tmp_path, ["a", "b", "c"]), EVERYTHING)
    board.ready(2.5)
    assert asyncio.run(finish(board)) == [[0], [1, 2], [3]]
    progress = board.progress()
    assert (progress.engines, progress.startup, progress.tokens) == (1, 2.5, 9)
    assert progress.adapter_samples == 16
    assert progress.seen == [4, 4, 4, 4]


def test_reading_adapters_and_an_engines_first_batch_are_no_scoring(tmp_path: Path) -> None:
    """Each job takes ten seconds, three of which go to reading its adapter."""

    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, ["a", "b"]), EVERYTHING)
        for loaded, warm in ((None, False), (Loaded(1, 500, 3.0), False), (Loaded(1, 700, 3.0), True)):
            job = await board.take("one", 1)
            assert job is not None
            board._held["one"].started -= 10
            await board.report("one", losses(job), tokens=70, loaded=loaded, warm=warm)
        progress = board.progress()
        assert (progress.tokens, progress.seconds) == (210, pytest.approx(30, abs=1))
        assert (progress.warm_tokens, progress.warm_seconds) == (70, pytest.approx(7, abs=1))
        assert progress.loaded == Loaded(2, 1200, 6.0)

    asyncio.run(scenario())


def test_scores_that_were_found_count_for_the_race_and_not_as_made(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, ["a", "b"]), EVERYTHING)
        for found in (0, 1):
            job = await board.take("one", 2)
            assert job is not None
            await board.report("one", losses(job), tokens=3, found=found)
        assert board.progress().seen == [4, 4, 4]
        assert board.progress().adapter_samples == 8

    asyncio.run(scenario())


def test_a_job_names_what_comes_next_so_that_it_can_be_fetched_ahead(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, ["a", "b", "c"]), EVERYTHING)
        first = await board.take("one", 2)
        assert first is not None
        assert first.upcoming == ["/pool/a", "/pool/b"]

    asyncio.run(scenario())


def test_what_a_dead_engine_held_is_given_out_again_one_at_a_time(tmp_path: Path) -> None:
    """Its process begins anew three times; the adapter that is in its hands each time is set aside, the other is not."""

    async def scenario() -> list[list[int]]:
        board = Scoreboard(work_on(tmp_path, ["a", "deadly"]), EVERYTHING)
        jobs = []
        while job := await board.take("one", 2):
            jobs.append(job.candidates)
            if 2 in job.candidates:
                await board.hello("one")
            else:
                await board.report("one", losses(job), tokens=0)
        assert board.progress().seen == [4, 4, 0]
        return jobs

    assert asyncio.run(scenario()) == [[0], [1, 2], [1], [2], [2]]
    assert "died, or hung, 3 times" in read_failures(Folder.at(tmp_path / "failures"))["deadly"]


def test_a_scoreboard_that_begins_anew_takes_no_report_of_what_it_did_not_give_out(tmp_path: Path) -> None:
    async def scenario() -> list[list[int]]:
        work = work_on(tmp_path, ["a"])
        job = await Scoreboard(work, EVERYTHING).take("one", 2)
        assert job is not None
        anew = Scoreboard(work, EVERYTHING)
        await anew.report("one", losses(job), tokens=3)
        return await finish(anew)

    assert asyncio.run(scenario()) == [[0], [1]]


def test_work_that_is_held_too_long_goes_to_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "LEASE", 0.0)

    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, []), EVERYTHING)
        slow = await board.take("slow", 1)
        again = await board.take("quick", 1)
        assert slow is not None
        assert again is not None
        assert again.candidates == slow.candidates == [0]
        await board.report("quick", losses(again), tokens=0)
        assert board.progress().over
        await board.report("slow", losses(slow), tokens=0)  # harmless
        assert await board.take("slow", 1) is None

    asyncio.run(scenario())


def test_an_engine_waits_where_everything_is_with_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, []), EVERYTHING)
        job = await board.take("one", 1)
        waiting = asyncio.create_task(board.take("two", 1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert job is not None
        await board.report("one", losses(job), tokens=0)
        assert await waiting is None

    asyncio.run(scenario())


def test_known_failures_and_adapters_without_scores_are_set_aside(tmp_path: Path) -> None:
    work = work_on(tmp_path, ["a", "b"])
    record_failures(work.failures, {"a": "corrupt"})

    async def scenario() -> None:
        board = Scoreboard(work, EVERYTHING)
        base = await board.take("one", 2)
        assert base is not None
        await board.report("one", losses(base), tokens=0)
        job = await board.take("one", 2)
        assert job is not None
        assert job.candidates == [2]
        await board.report("one", {}, tokens=0)
        assert board.progress().seen == [4, 0, 0]

    asyncio.run(scenario())


def test_a_base_that_cannot_be_scored_ends_the_race(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Scoreboard(work_on(tmp_path, ["a"]), EVERYTHING)
        await board.take("one", 1)
        await board.report("one", {}, tokens=0)
        assert await board.take("one", 1) is None
        seen = board.progress().seen
        assert seen is not None
        assert seen[0] == 0

    asyncio.run(scenario())


def test_a_race_against_time_leaves_out_who_was_not_reached(tmp_path: Path) -> None:
    """With no time at all, only the base is scored."""
    names = [f"a{n}" for n in range(20)]
    board = Scoreboard(work_on(tmp_path, names), Schedule((2, 4), None, 0.99), seconds=1e-9)
    board.ready(startup=0)
    assert asyncio.run(finish(board)) == [[0], [0]]
    progress = board.progress()
    assert progress.not_reached == 20
    assert progress.seen == [4] + [0] * 20
