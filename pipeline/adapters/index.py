"""The stage `index`: a pool of adapters -> catalogue.parquet."""

from collections.abc import Callable

from pipeline.adapters.catalogue import build_catalogue, valid_adapters
from pipeline.adapters.pool import list_adapters, pool_state
from pipeline.core.ledger import digest
from pipeline.core.tables import VERSION
from pipeline.model.base_model import fingerprint, linear_shapes
from pipeline.run_folder import Run


def index(run: Run, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Check every adapter of the pool.

    Args:
        meanwhile: called when the check begins, to prepare what comes after it.
    """
    config = run.config
    linear_shapes(config.base)  # an unknown base is said before anything starts
    listing = list_adapters(config.pool, config.exclude)
    key = digest(VERSION, fingerprint(config.base), listing, pool_state(config.pool))
    if run.ready("index", key):
        return
    run.progress.say(f"checking {len(listing['uri'])} adapters of {config.pool} against {config.base}")
    meanwhile()
    with run.ledger.perform("index", key) as details:
        factored = run.folder.sub("factored").uri
        checked = lambda n, total: run.progress.count(n, total, "adapters checked")  # noqa: E731
        catalogue = build_catalogue(config.base, config.pool, factored, checked, listing)
        run.check()
        run.folder.write_table("catalogue.parquet", catalogue)
        details["adapters"], details["set_aside"] = len(catalogue), len(catalogue) - len(valid_adapters(catalogue))
    run.progress.say(f"{len(valid_adapters(catalogue))} valid, {details['set_aside']} set aside")
