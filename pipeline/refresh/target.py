"""One target of a refresh: the stages up to the merge, in a run folder of its own, and what comes of them."""

from collections.abc import Callable
from typing import Any

from pipeline.adapters.index import index
from pipeline.config import Config, TargetConfig
from pipeline.core.storage import Folder
from pipeline.data.sample import samples
from pipeline.data.splits import target_paths
from pipeline.refresh.publish import chosen, publish
from pipeline.run import search_and_merge
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines


def index_pool(config: Config, folder: Folder) -> Run:
    """Check the pool once for all targets of a refresh, in a run folder that holds nothing else.

    Raises:
        InputError: the base or the pool is not right.
    """
    run = Run(config.model_copy(update={"run": folder.uri, "target": TargetConfig(train="-")}))
    with run.locked():
        index(run)
    return run


def renew(config: Config, pool: Run, published: Folder, threshold: float, check: Callable[[], None]) -> dict[str, Any]:
    """Score what is new for a target, select and merge anew where that may change, and publish what is worth it.

    Args:
        pool: the run that checked the pool.
        published: the target's published mashups.
        threshold: see `publish`.
        check: raises where publishing is not allowed any more.

    Returns:
        Columns of the history.

    Raises:
        InputError: the target is not right.
        LockTakenError: somebody works in the target's run folder by hand.
    """
    target_paths(config)
    run, engines = Run(config), Engines(config.search)
    with run.locked(), engines.kept():
        run.save_config()
        _take_index(run, pool)
        samples(run)
        key, before = _searched(run)
        search_and_merge(run, engines)
        check()
        outcome, current = publish(run, engines, published, threshold)
        key_now, spent = _searched(run)
    return _columns(run) | {
        "adapter_samples": spent - (before if key == key_now else 0),
        "outcome": outcome,
        "mashup": current["uri"],
    }


def _take_index(run: Run, pool: Run) -> None:
    """Take the catalogue over."""
    key = pool.ledger.key("index")
    if run.ledger.done("index", key):
        return
    with run.ledger.perform("index", key) as details:
        details |= pool.ledger.records["index"]["details"]
        run.folder.write_table("catalogue.parquet", pool.folder.read_table("catalogue.parquet"))


def _searched(run: Run) -> tuple[str, int]:
    """The key of the last search and the adapter-samples that it scored, over all attempts."""
    record = run.ledger.records.get("search", {"key": "", "details": {}})
    return record["key"], record["details"].get("adapter_samples", 0)


def _columns(run: Run) -> dict[str, Any]:
    selection = run.folder.read_json("selection.json")
    best = chosen(selection)
    return {
        "candidates": len(run.folder.read_table("leaderboard.parquet")) - 1,
        "verdict": selection["verdict"],
        "recipe": best.get("name"),
        "donors": [donor["adapter_id"] for donor in selection["donors"]],
        "holdout_nll": best.get("holdout_nll"),
        "base_holdout_nll": selection["base_holdout_nll"],
        "nll_minus_base": best.get("holdout_nll_minus_base"),
    }
