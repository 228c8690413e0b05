"""The scoreboard without Ray: what it gives out, to whom, and what becomes of work that nobody finishes."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.core.tables import SCORES, STORED
from pipeline.engines.scorer import Loaded
from pipeline.search import scoreboard as board_module
from pipeline.search.batch import Batch, Report, candidates_table
from pipeline.search.race import Schedule
from pipeline.search.score_store import ScoreStore, record_failures
from pipeline.search.scoreboard import HeldBy, Scoreboard, Work

EVERYTHING = Schedule((4,), None, 1.0)


def work_on(folder: Path, names: list[str]) -> Work:
    columns = [["base", *names], [None, *(f"/pool/{name}" for name in names)], ["base", *names]]
    candidates = candidates_table(*columns)
    samples = pa.table({"sample_id": [f"s{n}" for n in range(4)], "completion_mask": [[False, True, True]] * 4})
    store = ScoreStore.at(str(folder), "base", "vllm", "float32")
    return Work(candidates, samples, store, Folder.at(folder / "failures"))


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return batch.candidates["adapter_id"].to_pylist()


def scores_of(adapters: list[str], samples: list[str]) -> pa.Table:
    """Of each adapter on each sample."""
    pairs = [(adapter, sample, 1.0, 2, 0) for adapter in adapters for sample in samples]
    return pa.table([list(column) for column in zip(*pairs, strict=True)] if pairs else [[]] * 5, schema=SCORES)


def done(batch: Batch | None, **told: Any) -> Report:
    """All scores of a batch."""
    assert batch is not None
    return Report(batch.race, batch.number, scores_of(names(batch), batch.samples["sample_id"].to_pylist()), **told)


def begun(board: Scoreboard, engine: str, batch: Batch | None) -> tuple[list[str], dict[str, str]]:
    """An engine begins a batch: who is to be scored, and who is set aside."""
    assert batch is not None
    wanted, failures = board.begin(engine, batch.number)
    return wanted["adapter_id"].to_pylist(), failures


def finish(board: Scoreboard) -> list[list[str]]:
    """Do all work as one engine. The adapters of each batch."""
    batches = []
    while batch := board.next_batch(2):
        batches.append(names(batch))
        board.begin("one", batch.number)
        board.report(done(batch))
    return batches


def test_an_engine_gets_what_it_has_scored_before_in_place_of_what_others_have(tmp_path: Path) -> None:
    """Two engines score two adapters each in the first rung; the second rung is given out in the order of the pool."""
    board = Scoreboard(work_on(tmp_path, ["a", "b", "c", "d"]), Schedule((2, 4), None, 1.0, keep=4))
    board.engine_up(2, 2.5)
    begun(board, "one", base := board.next_batch(1))
    board.report(done(base))
    for engine in ("one", "other", "other", "one"):
        begun(board, engine, batch := board.next_batch(1))
        board.report(done(batch))
    begun(board, "one", base := board.next_batch(1))
    board.report(done(base))
    first, second = board.next_batch(1), board.next_batch(1)
    assert names(first) + names(second) == ["a", "b"]
    assert begun(board, "other", first) == (["c"], {})  # b is out with nobody yet, and still is the second's
    assert begun(board, "one", second) == (["d"], {})  # the last one is the likeliest to be in memory still
    third = board.next_batch(1)
    assert names(third) == ["b"]
    assert begun(board, "one", third) == (["a"], {})
    assert names(board.next_batch(1)) == ["b"]


def test_the_base_goes_alone_and_adapters_in_batches(tmp_path: Path) -> None:
    board = Scoreboard(work_on(tmp_path, ["a", "b", "c"]), EVERYTHING)
    board.engine_up(1, 2.5)
    assert finish(board) == [["base"], ["a", "b"], ["c"]]
    progress = board.progress()
    assert (progress.engines, progress.startup) == (1, 2.5)
    assert progress.seen == [4, 4, 4, 4]
    assert board.batches_out == 0


def test_an_adapter_is_held_by_who_scored_it_last() -> None:
    held = HeldBy()
    held.note("one", ["a", "b"])
    held.note("other", ["b", "c"])
    assert [held.adapters(engine) for engine in ("one", "other", "third")] == [["a"], ["b", "c"], []]
    assert held.recency("one", "b") == -1
    assert held.recency("other", "b") > held.recency("one", "a")


def test_the_last_adapters_of_a_rung_are_shared_among_the_engines(tmp_path: Path) -> None:
    board = Scoreboard(work_on(tmp_path, [*"abcdefghij"]), EVERYTHING)
    board.engine_up(4, 2.5)
    sizes = [len(names(batch)) for batch in iter(lambda: board.next_batch(8), None)]
    assert sizes == [1, 3, 2, 2, 1, 1, 1]  # the base alone


def test_a_batch_carries_the_adapters_and_the_samples_that_they_lack(tmp_path: Path) -> None:
    work = work_on(tmp_path, ["a", "b"])
    work.store.write(scores_of(["a", "b"], ["s0"]), work.hashes)
    board = Scoreboard(work, EVERYTHING, number=7)
    board.next_batch(2)
    batch = board.next_batch(2)
    assert batch is not None
    assert (batch.race, batch.stage, batch.alone) == (7, "search", False)
    assert batch.candidates.equals(work.candidates.slice(1))
    assert batch.samples.equals(work.samples.slice(1))


def test_what_engines_measure_adds_up_and_a_first_batch_of_adapters_is_no_measure_of_speed(tmp_path: Path) -> None:
    board = Scoreboard(work_on(tmp_path, ["a", "b"]), EVERYTHING)
    for loaded, warm in ((Loaded(), False), (Loaded(1, 500, 3.0), False), (Loaded(1, 700, 3.0), True)):
        board.report(done(board.next_batch(1), tokens=70, seconds=10.0, waited=1.5, loaded=loaded, warm=warm))
    progress = board.progress()
    assert (progress.tokens, progress.seconds, progress.waited) == (210, 30.0, 4.5)
    assert (progress.warm_tokens, progress.warm_seconds) == (70, 10.0)
    assert progress.loaded == Loaded(2, 1200, 6.0)


def test_what_another_run_has_scored_meanwhile_is_not_asked_for_again(tmp_path: Path) -> None:
    """`a` waits and `b` is out with an engine that has not begun; of `c` a half is known."""
    work = work_on(tmp_path, ["b", "a", "c"])
    board = Scoreboard(work, EVERYTHING)
    board.report(done(board.next_batch(1)))
    out = board.next_batch(1)
    stored = [("a", 4), ("b", 4), ("c", 2), ("nobody", 4)]
    news = pa.concat_tables([scores_of([name], [f"s{n}" for n in range(count)]) for name, count in stored])
    board.learn(news.append_column("adapter_hash", news["adapter_id"]).cast(STORED))
    assert out is not None
    assert begun(board, "one", out) == ([], {})
    assert board.batches_out == 0
    batch = board.next_batch(2)
    assert names(batch) == ["c"]
    assert batch is not None
    assert batch.samples["sample_id"].to_pylist() == ["s2", "s3"]
    board.report(done(batch))
    assert board.progress().seen == [4, 4, 4, 4]


def known(board: Scoreboard, adapters: list[str], samples: list[str]) -> None:
    """Another run has scored these."""
    scores = scores_of(adapters, samples)
    board.learn(scores.append_column("adapter_hash", scores["adapter_id"]).cast(STORED))


def test_what_is_learned_of_adapters_that_are_out_changes_nothing_of_their_being_out(tmp_path: Path) -> None:
    """They are not given to another engine meanwhile, and are not lost when theirs dies."""
    board = Scoreboard(work_on(tmp_path, ["a", "b"]), Schedule((2, 4), None, 0.99))
    for _ in range(2):
        board.report(done(board.next_batch(2)))
    board.report(done(board.next_batch(1)))
    batch = board.next_batch(2)
    assert names(batch) == ["a", "b"]
    assert batch is not None
    board.begin("one", batch.number)
    known(board, ["a", "b"], ["s0", "s1"])  # as in a file that another run has made of many
    assert board.next_batch(2) is None
    board.begin("one", batch.number)
    assert [one for one in finish(board) if one != ["base"]] == [["a"], ["b"]]
    assert board.progress().seen == [4, 4, 4]


def test_who_waits_and_becomes_known_does_not_run_ahead_of_its_rung(tmp_path: Path) -> None:
    """A budget that lets two of twenty into the second rung."""
    adapters = [f"a{n:02}" for n in range(20)]
    board = Scoreboard(work_on(tmp_path, adapters), Schedule((2, 4), 2 * 21 + 2 * 3, 1.0, keep=2))
    board.report(done(board.next_batch(1)))
    known(board, adapters[:12], ["s0", "s1"])
    batch = board.next_batch(4)
    assert names(batch) == adapters[12:16]
    assert batch is not None
    assert batch.samples["sample_id"].to_pylist() == ["s0", "s1"]


def test_what_merely_waited_in_an_engine_that_died_is_not_blamed(tmp_path: Path) -> None:
    """The engine dies with `a` alone, again and again, while `b` waits in it."""
    board = Scoreboard(work_on(tmp_path, ["a", "b", "c"]), EVERYTHING)
    board.report(done(board.next_batch(1)))
    first, second = board.next_batch(1), board.next_batch(1)
    for batch in (first, second):
        assert batch is not None
        board.begin("one", batch.number)
    for batch in (first, second):
        assert batch is not None
        assert begun(board, "one", batch) == ([], {})
    for _ in range(2):
        alone = board.next_batch(2)
        assert alone is not None
        name = names(alone)
        assert alone.alone
        board.begin("one", alone.number)
        if name == ["b"]:
            board.report(done(alone))
        else:
            board.begin("one", alone.number)
    while batch := board.next_batch(2):
        board.begin("one", batch.number)
        if names(batch) == ["a"]:
            board.begin("one", batch.number)
        else:
            board.report(done(batch))
    assert board.progress().seen == [4, 0, 4, 4]


def test_what_a_dead_engine_held_is_given_out_again_one_at_a_time(tmp_path: Path) -> None:
    """Ray Data gives a batch again to the engine that died with it. The adapter that is in its hands each time is set aside, the
    other is not."""
    board, batches, told = Scoreboard(work_on(tmp_path, ["a", "deadly"]), EVERYTHING), [], dict[str, str]()
    while batch := board.next_batch(2):
        batches.append((names(batch), batch.alone))
        assert begun(board, "one", batch) == (names(batch), {})
        if "deadly" in names(batch):
            wanted, failures = begun(board, "one", batch)
            assert wanted == []
            told |= failures
        else:
            board.report(done(batch))
    assert batches == [
        (["base"], False),
        (["a", "deadly"], False),
        (["a"], True),
        (["deadly"], True),
        (["deadly"], True),
    ]
    assert board.progress().seen == [4, 4, 0]
    assert told == {"deadly": "the engine died, or hung, 3 times with this adapter"}


def test_a_scoreboard_that_begins_anew_has_no_use_for_old_batches_and_counts_their_scores(tmp_path: Path) -> None:
    work = work_on(tmp_path, ["a", "b"])
    before = Scoreboard(work, EVERYTHING)
    base, adapters = before.next_batch(2), before.next_batch(2)
    anew = Scoreboard(work, EVERYTHING)
    assert base is not None
    assert begun(anew, "one", base) == ([], {})
    anew.report(done(adapters))
    assert finish(anew) == [["base"]]


def test_work_that_is_held_too_long_goes_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "LEASE", 0.0)
    board = Scoreboard(work_on(tmp_path, []), EVERYTHING)
    slow = board.next_batch(1)
    assert slow is not None
    board.begin("slow", slow.number)
    assert board.at_work == {"slow"}
    time.sleep(0.01)
    assert board.next_batch(1) is None
    board.reclaim()
    again = board.next_batch(1)
    assert names(again) == names(slow) == ["base"]
    board.report(done(again))
    assert board.progress().over
    board.report(done(slow))  # harmless
    assert board.next_batch(1) is None


@pytest.mark.parametrize("late_reports", [False, True])
def test_who_was_taken_back_is_not_held_by_an_engine_that_begins_late(
    late_reports: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next rung would wait for it for ever."""
    monkeypatch.setattr(board_module, "LEASE", 0.0)
    board = Scoreboard(work_on(tmp_path, ["a", "b"]), Schedule((2, 4), None, 1.0, keep=2))
    board.report(done(board.next_batch(1)))
    late = board.next_batch(1)
    time.sleep(0.01)
    board.reclaim()
    again = board.next_batch(1)
    assert names(again) == names(late) == ["a"]
    begun(board, "one", again)
    if late_reports:
        assert begun(board, "late", late) == (["a"], {})
        board.report(done(again))
        board.report(done(late))
    else:
        board.report(done(again))
        assert begun(board, "late", late) == ([], {})
    finish(board)
    assert board.progress().over


def test_work_that_waits_for_a_lost_engine_goes_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun with one batch, and another waits for it."""
    board = Scoreboard(work_on(tmp_path, ["a", "b"]), EVERYTHING)
    board.report(done(board.next_batch(1)))
    begun, waits = board.next_batch(1), board.next_batch(1)
    assert begun is not None
    assert waits is not None
    board.begin("lost", begun.number)
    board.reclaim()
    assert board.next_batch(1) is None  # it may be on its way to the other one
    monkeypatch.setattr(board_module, "LEASE", 0.0)
    time.sleep(0.01)
    board.reclaim()
    assert [sorted(batch) for batch in finish(board)] == [["a", "b"]]
    assert board.progress().over


def test_known_failures_and_adapters_without_scores_are_set_aside(tmp_path: Path) -> None:
    work = work_on(tmp_path, ["a", "b"])
    record_failures(work.failures, {"a": "corrupt"})
    board = Scoreboard(work, EVERYTHING)
    board.report(done(board.next_batch(2)))
    batch = board.next_batch(2)
    assert names(batch) == ["b"]
    assert batch is not None
    board.report(Report(batch.race, batch.number, SCORES.empty_table(), {"b": "gone"}))
    assert board.progress().seen == [4, 0, 0]


def test_a_base_that_cannot_be_scored_ends_the_race(tmp_path: Path) -> None:
    board = Scoreboard(work_on(tmp_path, ["a"]), EVERYTHING)
    batch = board.next_batch(1)
    assert batch is not None
    board.report(Report(batch.race, batch.number, SCORES.empty_table(), {"base": "no"}))
    assert board.next_batch(1) is None
    seen = board.progress().seen
    assert seen is not None
    assert seen[0] == 0


def test_a_race_against_time_leaves_out_who_was_not_reached(tmp_path: Path) -> None:
    """With no time at all, only the base is scored."""
    adapters = [f"a{n}" for n in range(20)]
    board = Scoreboard(work_on(tmp_path, adapters), Schedule((2, 4), None, 0.99), seconds=1e-9)
    board.engine_up(1, startup=0)
    assert finish(board) == [["base"], ["base"]]
    progress = board.progress()
    assert progress.not_reached == 20
    assert progress.seen == [4] + [0] * 20


def test_by_token_accuracy_who_misses_the_fewest_tokens_goes_on(tmp_path: Path) -> None:
    """`sure` has the worse loss, and its first choices are right."""
    work = replace(work_on(tmp_path, ["likely", "sure"]), rank_by="token_accuracy")
    board = Scoreboard(work, Schedule((2, 4), 8, 1.0, keep=1))
    board.engine_up(1, 0.0)
    right = {"base": (1.0, 0), "likely": (0.1, 0), "sure": (5.0, 2)}
    while board.race.rung == 0 and (batch := board.next_batch(2)):
        pairs = [(name, sample, *right[name]) for name in names(batch) for sample in batch.samples["sample_id"].to_pylist()]
        rows = [
            {"adapter_id": one, "sample_id": two, "nll_sum": nll, "n_tokens": 2, "n_correct": n} for one, two, nll, n in pairs
        ]
        board.begin("one", batch.number)
        board.report(Report(batch.race, batch.number, pa.Table.from_pylist(rows, schema=SCORES)))
    assert board.race.nll_NS[[1, 2], 0].tolist() == [2, 0]
    assert board.race.racing().tolist() == [0, 2]


def test_an_engine_that_does_not_tell_first_choices_is_no_use_for_token_accuracy(tmp_path: Path) -> None:
    board = Scoreboard(replace(work_on(tmp_path, ["a"]), rank_by="token_accuracy"), EVERYTHING)
    board.engine_up(1, 0.0)
    batch = board.next_batch(1)
    assert batch is not None
    report = done(batch)
    untold = report.scores.set_column(4, "n_correct", pa.nulls(len(report.scores), pa.int32()))
    board.learn(untold.append_column("adapter_hash", pa.array(["base"] * len(untold))))  # another run's do not count
    with pytest.raises(InputError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        board.report(replace(report, scores=untold))
