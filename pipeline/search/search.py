"""The stage `search`: catalogue x samples -> leaderboard.parquet and scores/."""

from collections.abc import Callable

import pyarrow as pa

from pipeline.adapters.adapter import CHANGED
from pipeline.adapters.catalogue import valid_adapters_of
from pipeline.core.ledger import digest
from pipeline.core.tables import SAMPLES, require
from pipeline.data.splits import split_of
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run
from pipeline.search.contamination import find_contamination
from pipeline.search.engine_pool import Engines
from pipeline.search.leaderboard import build_leaderboard, score_table, unsound
from pipeline.search.past_targets import choose_entrants, record_outcome
from pipeline.search.score_store import forget_failures, read_failures
from pipeline.search.scoring import by_rank, largest_rank, make_engine, prepare_race, race, score_outliers, servable


def search(
    run: Run,
    engines: Engines | None = None,
    merged_rank: Callable[[list[int]], int] = lambda ranks: 0,
    on_start: Callable[[Run], None] = lambda run: None,
) -> None:
    """Race the base and the adapters that have a chance over the samples, within the budget, and rank them.

    Without a chance is who cannot be served, or is not among the best by what past targets teach; outliers by rank are scored
    apart.

    Args:
        engines: those that the merge uses, too; None: of its own.
        merged_rank: the largest rank that a merge of adapters of these ranks may have, for which the engines must have room.
        on_start: called where the search is not done yet, before it works.
    """
    run.needs("index", "the catalogue", "mashup index")
    run.needs("samples", "the sample", "mashup search")
    config, engines = run.config, engines or Engines(run.config.search)
    catalogue = valid_adapters_of(run.folder)
    drawn = require(run.folder.read_table("samples.parquet"), SAMPLES, "samples.parquet")
    key = search_key(run, catalogue, drawn)
    if run.ready("search", key):
        return
    on_start(run)
    engines.expected = len(catalogue) + 1
    with engines.kept(), run.ledger.perform("search", key) as details:
        failures = run.folder.sub("failures")
        forget_failures(failures, CHANGED)
        _tell_contamination(run, catalogue, drawn)
        catalogue = servable(run, catalogue, failures)
        usual, outliers = by_rank(run, catalogue)
        score_outliers(run, engines, outliers, drawn, failures, details)
        engine = make_engine(run, catalogue, largest_rank(run, usual, merged_rank(usual["rank"].to_pylist())))
        racing = choose_entrants(run, engines, engine, catalogue, drawn, failures, details)
        work, schedule = prepare_race(run, racing, drawn, failures)
        known, seen = race(run, engines, work, engine, schedule, details, config.search.budget.seconds)
        engines.expected = 0  # the races of the merge are small
        names = work.candidates["adapter_id"].to_pylist()
        run.check()
        details |= record_outcome(run, names, known, seen)
        run.folder.write_json("scoring_failures.json", read_failures(work.failures) | unsound(names, known, seen))
        run.folder.write_table("scores/scores.parquet", score_table(names, known, drawn["sample_id"].to_pylist()))
        run.folder.write_table("leaderboard.parquet", build_leaderboard(names, known, seen, len(split_of(drawn, "search"))))
        work.store.merge_files()


def search_key(run: Run, catalogue: pa.Table, drawn: pa.Table) -> str:
    """What the search depends on, as a digest."""
    asked = run.config.search.model_dump(include={"engine", "dtype", "budget"})
    hashes = catalogue["adapter_hash"].to_pylist()
    return digest(fingerprint(run.config.base), drawn["sample_id"].to_pylist(), hashes, asked)


def _tell_contamination(run: Run, catalogue: pa.Table, drawn: pa.Table) -> None:
    """Say which adapters were trained on the target's own rows, by their cards."""
    held = {split: run.folder.read_table(f"data/{split}.parquet") for split in ("validation", "test")}
    found = find_contamination(catalogue, run.config.base, run.config.target.train, {"sample": drawn, **held})
    run.folder.write_json("contamination.json", found)
    for name, sentences in found.items():
        run.progress.say(f"{name}: {'; '.join(sentences)}")
