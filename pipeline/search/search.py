"""The stage `search`: catalogue x samples -> leaderboard.parquet and scores/."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pyarrow as pa

from pipeline.adapters.adapter import CHANGED
from pipeline.adapters.catalogue import valid_adapters_of
from pipeline.core.ledger import digest
from pipeline.core.tables import SAMPLES, require
from pipeline.data.splits import split_of
from pipeline.engines.scorer import EngineConfig
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run
from pipeline.search.contamination import find_contamination
from pipeline.search.engine_pool import Engines
from pipeline.search.leaderboard import build_leaderboard, score_table, unsound
from pipeline.search.past_targets import RISK, choose_entrants, record_outcome
from pipeline.search.score_store import Known, forget_failures, read_failures
from pipeline.search.scoring import (
    Contest,
    by_rank,
    largest_rank,
    make_engine,
    prepare_race,
    race_together,
    score_outliers,
    servable,
)

MergedRank = Callable[[list[int]], int]
"""The largest rank that a merge of adapters of these ranks may have, for which engines that stay up for it must have room."""


def search(
    run: Run,
    engines: Engines | None = None,
    merged_rank: MergedRank = lambda ranks: 0,
    on_start: Callable[[Run], None] = lambda run: None,
) -> None:
    """Race the base and the adapters that have a chance over the samples, within the budget, and rank them.

    Without a chance is who cannot be served, or is not among the best by what past targets teach; outliers by rank are scored
    apart.

    Args:
        engines: those that the merge uses, too; None: of its own.
        on_start: called where the search is not done yet, before it works.
    """
    search_together([run], engines or Engines(run.config.search), merged_rank, on_start)


def search_together(
    runs: Sequence[Run],
    engines: Engines,
    merged_rank: MergedRank = lambda ranks: 0,
    on_start: Callable[[Run], None] = lambda run: None,
) -> None:
    """The searches of runs over one pool, which may be of different targets, side by side; as `search`. What goes wrong in one of
    them is raised; the scores that were made are kept, each search can be done alone."""
    with engines.kept(), ExitStack() as stages:
        begun = [one for run in runs if (one := _begin(run, engines, merged_rank, on_start, stages))]
        if not begun:
            return
        engine = max((one.engine for one in begun), key=lambda engine: engine.max_tokens)
        contests = [one.contest for one in begun]
        for one, (known, seen) in zip(begun, race_together(engines, engine, contests), strict=True):
            _rank(one, known, seen)
        engines.expected = 0  # the races of the merge are small


@dataclass(frozen=True)
class _Begun:
    """A search that is ready to race."""

    contest: Contest
    engine: EngineConfig


def _begin(
    run: Run, engines: Engines, merged_rank: MergedRank, on_start: Callable[[Run], None], stages: ExitStack
) -> _Begun | None:
    """Find out who races, and score those that are scored apart. None: the search is done."""
    run.needs("index", "the catalogue", "mashup index")
    run.needs("samples", "the sample", "mashup search")
    catalogue = valid_adapters_of(run.folder)
    drawn = require(run.folder.read_table("samples.parquet"), SAMPLES, "samples.parquet")
    key = search_key(run, catalogue, drawn)
    if run.ready("search", key):
        return None
    on_start(run)
    engines.expected = len(catalogue) + 1
    details = stages.enter_context(run.ledger.perform("search", key))
    failures = run.folder.sub("failures")
    forget_failures(failures, CHANGED)
    _tell_contamination(run, catalogue, drawn)
    catalogue = servable(run, catalogue, failures)
    usual, outliers = by_rank(run, catalogue)
    score_outliers(run, engines, outliers, drawn, failures, details)
    engine = make_engine(run, catalogue, largest_rank(run, usual, merged_rank(usual["rank"].to_pylist())))
    racing = choose_entrants(run, engines, engine, catalogue, drawn, failures, details)
    foretold = len(racing) < len(catalogue)
    work, schedule = prepare_race(run, racing, drawn, failures, RISK if foretold else 0.0)
    return _Begun(Contest(run, work, schedule, details, run.config.search.budget.seconds), engine)


def _rank(begun: _Begun, known: Known, seen: list[int]) -> None:
    """Put down what a race has shown."""
    run, work, details = begun.contest.run, begun.contest.work, begun.contest.details
    names, drawn = work.candidates["adapter_id"].to_pylist(), work.samples
    run.check()
    details |= record_outcome(run, names, known, seen) | _reused(run, seen)
    run.folder.write_json("scoring_failures.json", read_failures(work.failures) | unsound(names, known, seen))
    run.folder.write_table("scores/scores.parquet", score_table(names, known, drawn["sample_id"].to_pylist()))
    run.folder.write_table("leaderboard.parquet", _leaderboard(begun, names, known, seen))
    work.store.merge_files()


def _reused(run: Run, seen: list[int]) -> dict[str, int]:
    """How many scores the search used, and how many of these were in the store before it, from a plan or from other runs: their
    time is not in its own. After a stop that is not known, as the scores of its first attempts are in the store, too."""
    record = run.ledger.records["search"]
    if len(record["spans"]) > 1:
        return {}
    used = sum(seen)
    return {"used_samples": used, "reused_samples": max(0, used - int(record["details"].get("adapter_samples", 0)))}


def _leaderboard(begun: _Begun, names: list[str], known: Known, seen: list[int]) -> pa.Table:
    work = begun.contest.work
    return build_leaderboard(names, known, seen, len(split_of(work.samples, "search")), work.rank_by)


def search_key(run: Run, catalogue: pa.Table, drawn: pa.Table) -> str:
    """What the search depends on, as a digest."""
    asked = run.config.search.model_dump(include={"engine", "dtype", "budget", "rank_by"})
    hashes = catalogue["adapter_hash"].to_pylist()
    return digest(fingerprint(run.config.base), drawn["sample_id"].to_pylist(), hashes, asked)


def _tell_contamination(run: Run, catalogue: pa.Table, drawn: pa.Table) -> None:
    """Say which adapters were trained on the target's own rows, by their cards."""
    held = {split: run.folder.read_table(f"data/{split}.parquet") for split in ("validation", "test")}
    found = find_contamination(catalogue, run.config.base, run.config.target.train, {"sample": drawn, **held})
    run.folder.write_json("contamination.json", found)
    for name, sentences in found.items():
        run.progress.say(f"{name}: {'; '.join(sentences)}")
