"""The stage `index`: a pool of adapters -> catalogue.parquet."""

from collections.abc import Callable

import peft

from pipeline.adapters.catalogue import CHECKS, build_catalogue, valid_adapters
from pipeline.adapters.kept_rows import KEPT, KeptRows
from pipeline.adapters.pool import look_at
from pipeline.core.base_ref import name_of
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import VERSION
from pipeline.model.base_model import fingerprint, linear_shapes
from pipeline.run_folder import Run


def index(run: Run, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Check every adapter of the pool; of those that were checked before, and are as they were, the rows are kept.

    Args:
        meanwhile: called when the check begins, to prepare what comes after it.
    """
    config = run.config
    linear_shapes(config.base)  # an unknown base is said before anything starts
    pool = look_at(config.pool, config.exclude)
    key = digest(VERSION, CHECKS, fingerprint(config.base), pool.listing, pool.state)
    if run.ready("index", key):
        return
    run.progress.say(f"checking {len(pool.found)} adapters of {config.pool} against {name_of(config.base)}")
    meanwhile()
    with run.ledger.perform("index", key) as details:
        factored = run.folder.sub("factored").uri
        checked = lambda n, total: run.progress.count(n, total, "adapters checked")  # noqa: E731
        kept = KeptRows(_rows_folder(run))
        catalogue = build_catalogue(config.base, config.pool, factored, checked, pool.found, kept)
        run.check()
        run.folder.write_table("catalogue.parquet", catalogue)
        details["adapters"], details["set_aside"] = len(catalogue), len(catalogue) - len(valid_adapters(catalogue))
    run.progress.say(f"{len(valid_adapters(catalogue))} valid, {details['set_aside']} set aside")


def _rows_folder(run: Run) -> Folder:
    """Where rows are kept for the next index of this base by these checks: beside the scores, where runs share these."""
    store, base = run.config.search.store, run.config.base
    home = Folder.at(store) if store else run.folder
    return home.sub("rows", digest(CHECKS, str(KEPT), peft.__version__, fingerprint(base), name_of(base)))
