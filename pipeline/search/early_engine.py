"""Starts the engine of a search while its pool is still being checked, with what the adapters' files declare.

On a machine of the run's own without GPUs, where one engine is all that there will be. Elsewhere Ray must know what an engine
takes, so as not to start two of them in one place.
"""

from collections.abc import Callable, Sequence

import pyarrow as pa

from pipeline.adapters.first_look import first_look
from pipeline.adapters.pool import Listed
from pipeline.cluster.connect import is_own
from pipeline.cluster.resources import live_nodes
from pipeline.core.tables import CANDIDATES
from pipeline.data.first_samples import first_samples
from pipeline.engines.canary import ROWS
from pipeline.engines.scorer import EngineConfig, too_large
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines, engines_at_once, scoring_resources
from pipeline.search.scoreboard import Work
from pipeline.search.scoring import largest_rank, make_engine, store_of


def begin_early(run: Run, engines: Engines, merged_rank: Callable[[list[int]], int], found: Sequence[Listed]) -> None:
    """Start the engine, where it can be foretold what it has to hold. If it turns out to be too small, the search starts another.

    Args:
        merged_rank: as of `search.search`.
        found: the pool, as `look_at` found it.
    """
    search = run.config.search
    shared = not is_own() or len(live_nodes()) > 1
    if shared or scoring_resources(search).gpus or engines_at_once(search, len(found) + 1) > 1:
        return
    if expected := expected_engine(run, first_look(found, run.config.base), merged_rank):
        try:
            rows = first_samples(run.config, ROWS)
        except Exception:  # of whatever kind: the stage that reads the target says it
            return
        if len(rows):
            engines.begin(expected, Work(CANDIDATES.empty_table(), rows, store_of(run), run.folder.sub("failures")))


def expected_engine(run: Run, declared: pa.Table, merged_rank: Callable[[list[int]], int]) -> EngineConfig | None:
    """What the engine will have to hold if all these adapters (schema DECLARED) are valid; None: nothing is known."""
    served = [too_large(run.config.search.engine, rank) is None for rank in declared["rank"].to_pylist()]
    if not any(served):
        return None
    declared = declared.filter(pa.array(served))
    return make_engine(run, declared, largest_rank(run, declared, merged_rank(declared["rank"].to_pylist())))
