"""Candidates in, scores out: what the search and the merge share of racing candidates over samples."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.telemetry import tell
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.data.splits import split_of
from pipeline.engines.scorer import EngineConfig, engine_version, too_large
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run
from pipeline.search.batch import with_base
from pipeline.search.engine_pool import Engines, engine_config, scoring_dtype, scoring_kind, scoring_resources
from pipeline.search.race import CONFIDENCE, Schedule, make_schedule
from pipeline.search.rates import Rates
from pipeline.search.score_store import Known, ScoreStore, read_failures, record_failures
from pipeline.search.scoreboard import RaceProgress, Work

OUTLIERS = 0.02
"""Share of a pool that may be outliers by their rank, one adapter at least: each is scored on every sample."""

FAR, LARGE = 4, 64
"""An outlier has at least so many times the largest rank of the others, and a rank above LARGE: up to there the products with A
and B are a few percent of the base's, and the slots for adapters of an 8B model take some 0.3 GB each. By arithmetic; not
measured."""


def servable(run: Run, catalogue: pa.Table, failures: Folder) -> pa.Table:
    """The adapters that the engine has room for; the others are set aside with the reason.

    Raises:
        InputError: there are no others.
    """
    pairs = zip(catalogue["adapter_id"].to_pylist(), catalogue["rank"].to_pylist(), strict=True)
    reasons = {name: reason for name, rank in pairs if (reason := too_large(run.config.search.engine, rank))}
    if len(reasons) == len(catalogue):
        raise InputError(f"{run.config.pool}: no adapter can be scored: {next(iter(reasons.values()))}")
    record_failures(failures, reasons)
    return catalogue.filter(pc.invert(pc.is_in(catalogue["adapter_id"], pa.array(reasons, pa.string()))))


def in_order(run: Run, catalogue: pa.Table, drawn: pa.Table) -> pa.Table:
    """The adapters in the order of scoring. Those of like rank share a batch, as vLLM computes with the largest rank in it; of
    these, the ones that earlier runs found to be good come first, then those of which nothing is known. It matters where time
    ends the search; runs that start together on one store begin at different places of the pool, so that each finds scores that
    the others made."""
    known = store_of(run).mean_losses(drawn)
    start = int(digest(run.folder.uri), 16) % max(1, len(catalogue))
    catalogue = pa.concat_tables([catalogue.slice(start), catalogue.slice(0, start)])
    rows = pc.index_in(catalogue["adapter_hash"], known["adapter_hash"].combine_chunks())
    losses = known["known_nll"].take(rows)
    keyed = pa.table([catalogue["rank"], losses], ["rank", "known_nll"])
    return catalogue.take(pc.sort_indices(keyed, [("rank", "ascending"), ("known_nll", "ascending")]))


def make_work(run: Run, adapters: pa.Table, samples: pa.Table, failures: Folder) -> Work:
    """The base and these adapters (columns CANDIDATES) on these samples."""
    return Work(with_base(adapters), samples, store_of(run), failures, run.ledger.running or "search")


def prepare_race(run: Run, catalogue: pa.Table, drawn: pa.Table, failures: Folder, risk: float = 0.0) -> tuple[Work, Schedule]:
    """The race that the search runs: the base and these adapters on these samples, within the budget; `risk` as of `Schedule`."""
    work = replace(make_work(run, in_order(run, catalogue, drawn), drawn, failures), rank_by=run.config.search.rank_by)
    n_search, budget = len(split_of(drawn, "search")), run.config.search.budget
    level = budget.confidence or CONFIDENCE
    return work, make_schedule(len(work.candidates), n_search, len(drawn) - n_search, budget.share, level, risk)


def largest_rank(run: Run, catalogue: pa.Table, merged: int = 0) -> int:
    """Of what the engines of a search are to hold: these adapters, and one of rank `merged` where they stay up for the merge."""
    return max(*catalogue["rank"].to_pylist(), 0 if too_large(run.config.search.engine, merged) else merged)


def rank_outliers(ranks: Sequence[int]) -> list[bool]:
    """Of each adapter of a pool, whether its rank is an outlier, which would make scoring slower for all others: on GPUs vLLM
    computes with the largest rank that an engine may hold, and keeps slots of it."""
    allowed = math.ceil(OUTLIERS * len(ranks))
    if len(ranks) <= allowed:
        return [False] * len(ranks)
    usual = sorted(ranks)[-allowed - 1]
    return [rank > LARGE and rank >= FAR * usual for rank in ranks]


def by_rank(run: Run, catalogue: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The adapters that share engines, and the outliers by their rank. There are none on CPUs, where our plugin computes with
    each adapter's own rank, as transformers does anywhere."""
    search = run.config.search
    if search.engine != "vllm" or not scoring_resources(search).gpus:
        return catalogue, catalogue.slice(0, 0)
    apart = pa.array(rank_outliers(catalogue["rank"].to_pylist()), pa.bool_())
    return catalogue.filter(pc.invert(apart)), catalogue.filter(apart)


def score_outliers(
    run: Run, engines: Engines, outliers: pa.Table, drawn: pa.Table, failures: Folder, details: dict[str, Any]
) -> None:
    """Score the outliers by rank, and the base, on every sample, with engines that hold them alone and end with it. The race then
    finds their scores in the store and judges them by the same samples as all others, as if its own engines had made them. A
    budget in seconds does not count this time."""
    if not len(outliers):
        return
    run.progress.say(f"{len(outliers)} adapters of rank {max(outliers['rank'].to_pylist())} at most are scored apart")
    work = make_work(run, outliers, drawn, failures)
    schedule = make_schedule(len(work.candidates), len(drawn), 0, share=1)
    race(run, engines, work, make_engine(run, outliers, largest_rank(run, outliers)), schedule, details)
    engines.close()  # else they serve the race, too


def make_engine(run: Run, catalogue: pa.Table, max_rank: int) -> EngineConfig:
    leaves = {leaf for leaves in catalogue["target_modules"].to_pylist() for leaf in leaves}
    return engine_config(run.config.base, max_rank, leaves, run.config.search, run.config.target.max_tokens)


@dataclass(frozen=True)
class Contest:
    """A race of a run. `details` are of the stage that it is part of; `seconds`: as of `engine_pool.Asked`."""

    run: Run
    work: Work
    schedule: Schedule
    details: dict[str, Any]
    seconds: float | None = None


def race(
    run: Run,
    engines: Engines,
    work: Work,
    engine: EngineConfig,
    schedule: Schedule,
    details: dict[str, Any],
    limit: float | None = None,
) -> tuple[Known, list[int]]:
    """Run a race, saying how far it is. Gives all scores, and how many samples count for each candidate."""
    (result,) = race_together(engines, engine, [Contest(run, work, schedule, details, limit)])
    return result


def race_together(engines: Engines, engine: EngineConfig, contests: Sequence[Contest]) -> list[tuple[Known, list[int]]]:
    """Run races of several runs side by side, each as `race`. An engine that has an adapter scores it for all of them."""
    boards, began = [RaceProgress()] * len(contests), time.perf_counter()
    for boards in engines.races([(one.work, one.schedule, one.seconds) for one in contests], engine):
        for one, board in zip(contests, boards, strict=True):
            _measure(one.run.folder.uri, board)
            _tell(one.run, board, len(one.work.candidates), len(one.work.samples))
            one.run.ledger.beat()
            one.run.shared_paths.check()  # of nodes that have joined
    wall = time.perf_counter() - began
    if len(contests) == 1 and (measured := speed_of(boards[0], wall)):
        search = contests[0].run.config.search
        rates_of(contests[0].run).keep(scoring_kind(search), measured, asked=scoring_kind(search, named=False))
    return [_result(one, board, wall) for one, board in zip(contests, boards, strict=True)]


def _result(contest: Contest, board: RaceProgress, wall: float) -> tuple[Known, list[int]]:
    work, details = contest.work, contest.details
    if not board.seen or not board.seen[0]:
        reason = read_failures(work.failures).get(BASE_ID)
        work.failures.delete("")  # so that the same command tries again
        raise RuntimeError(f"the base model itself could not be scored: {reason}")
    if board.not_reached:
        contest.run.progress.say(f"{board.not_reached} adapters were not reached in {contest.seconds:g} s")
    spent = {"adapter_samples": board.adapter_samples, "tokens": board.tokens, "scoring_seconds": board.seconds}
    for name, value in ({"engine_start_seconds": board.startup} | spent | {"race_seconds": wall}).items():
        details[name] = round(details.get(name, 0) + value, 1)
    return work.store.load(work.candidates["adapter_hash"].to_pylist(), work.samples), board.seen


def score_on_holdout(
    run: Run,
    engines: Engines,
    adapters: pa.Table,
    catalogue: pa.Table,
    drawn: pa.Table,
    max_rank: int,
    details: dict[str, Any],
) -> tuple[Known, list[int]]:
    """Score the base and these adapters (columns CANDIDATES) on every hold-out sample of those drawn, as `race` does."""
    holdout = split_of(drawn, "holdout")
    work = make_work(run, adapters, holdout, run.folder.sub("candidates", "failures"))
    schedule = make_schedule(len(work.candidates), len(holdout), 0, share=1)
    return race(run, engines, work, make_engine(run, catalogue, max_rank), schedule, details)


def rates_of(run: Run) -> Rates:
    """What earlier runs measured on this base model with this way of scoring."""
    return Rates.beside(store_of(run))


def speed_of(board: RaceProgress, wall: float) -> dict[str, float]:
    """What a race of `wall` seconds measured of one engine, as far as it did: input tokens a second once it is warm, the seconds
    that reading an adapter takes, and a byte of one, and those in which nothing was scored: mostly Ray's workers and engines that
    started."""
    measured: dict[str, float] = {}
    if board.warm_seconds:
        measured["tokens_per_second"] = board.warm_tokens / board.warm_seconds
    if board.loaded.adapters:
        measured["load_seconds_per_adapter"] = board.loaded.seconds / board.loaded.adapters
        measured["load_seconds_per_byte"] = board.loaded.seconds / board.loaded.bytes
    if board.startup:  # else it found them up
        measured["start_seconds"] = max(0.0, wall - board.seconds / board.engines)
    return measured


def store_of(run: Run) -> ScoreStore:
    """The scores that a run knows of: its own, or those that runs share."""
    search = run.config.search
    uri = search.store or run.folder.sub("store").uri
    engine = f"{search.engine}-{engine_version(search.engine)}"
    return ScoreStore.at(uri, fingerprint(run.config.base), engine, scoring_dtype(search))


def _measure(run: str, board: RaceProgress) -> None:
    """How far a race is, what waits in it and how fast it goes, as Ray metrics."""
    for name in ("engines", "rung", "outstanding", "adapter_samples"):
        tell(f"mashup_search_{name}", getattr(board, name), run)
    if board.seconds:
        tell("mashup_search_tokens_per_second", board.tokens / board.seconds, run)


def _tell(run: Run, board: RaceProgress, n_candidates: int, n_samples: int) -> None:
    """Say how far a race is."""
    if not board.engines and not board.over:
        run.progress.now_and_then(f"starting {run.config.search.engine}; {board.outstanding} of {n_candidates} candidates wait")
        return
    speed = f", {board.tokens / board.seconds:.0f} tokens/s an engine" if board.tokens else ""
    if board.over:
        if not board.adapter_samples:
            run.progress.say("nothing new was scored")
            return
        share = board.adapter_samples / (n_candidates * n_samples)
        run.progress.say(f"scored {board.adapter_samples} adapter-samples, {share:.0%} of all that there are{speed}")
        return
    rung = f"rung {board.rung} of {board.rungs}: " if board.rungs > 1 else ""
    run.progress.now_and_then(f"{rung}{board.entrants - board.outstanding} of {board.entrants} candidates scored{speed}")
