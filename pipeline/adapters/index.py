"""The stage `index`: a pool of adapters -> catalogue.parquet."""

import re
from collections.abc import Callable, Sequence

import peft
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.adapters.catalogue import CHECKS, build_catalogue, valid_adapters
from pipeline.adapters.kept_rows import KEPT, KeptRows
from pipeline.adapters.pool import A_CHECKPOINT, Listed, look_at
from pipeline.core.base_ref import name_of
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import VERSION
from pipeline.model.base_model import fingerprint, linear_shapes
from pipeline.run_folder import Run

KIND = re.compile(r"[:(;,]| of (?=\S)")
"""What ends the general part of a reason."""

NO_LOSS = ("duplicate", "excluded", A_CHECKPOINT)
"""Beginnings of reasons for which no donor is lost."""

MAX_KINDS = 8
"""That are told after an index."""


def index(run: Run, meanwhile: Callable[[Sequence[Listed]], None] = lambda found: None) -> None:
    """Check every adapter of the pool; of those that were checked before, and are as they were, the rows are kept.

    Args:
        meanwhile: called with what the pool lists when the check begins, to prepare what comes after it.
    """
    config = run.config
    linear_shapes(config.base)  # an unknown base is said before anything starts
    pool = look_at(config.pool, config.exclude, config.checkpoints == "include")
    key = digest(VERSION, CHECKS, fingerprint(config.base), pool.listing, pool.state, config.search.engine)
    if run.ready("index", key):
        return
    run.progress.say(f"checking {len(pool.found)} adapters of {config.pool} against {name_of(config.base)}")
    meanwhile(pool.found)
    with run.ledger.perform("index", key) as details:
        factored = run.folder.sub("factored").uri
        checked = lambda n, total: run.progress.count(n, total, "adapters checked")  # noqa: E731
        kept = KeptRows(_rows_folder(run))
        catalogue = build_catalogue(config.base, config.pool, factored, checked, pool.found, kept, config.search.engine)
        run.check()
        run.folder.write_table("catalogue.parquet", catalogue)
        details["adapters"], details["set_aside"] = len(catalogue), len(catalogue) - len(valid_adapters(catalogue))
    run.progress.say(f"{len(valid_adapters(catalogue))} valid, {details['set_aside']} set aside")
    for line in reasons(catalogue):
        run.progress.say(line)


def reasons(catalogue: pa.Table) -> list[str]:
    """Why adapters were set aside, by kinds: those that could have been donors first, then what is there twice or was asked."""
    aside = catalogue.filter(pc.equal(catalogue["status"], "set_aside")).select(["adapter_id", "reason"]).to_pylist()
    kinds: dict[str, list[dict[str, str]]] = {}
    for row in aside:
        kinds.setdefault(KIND.split(row["reason"])[0].strip(), []).append(row)
    order = sorted(kinds, key=lambda kind: (kind.startswith(NO_LOSS), -len(kinds[kind]), kind))
    lines = [f"{len(kinds[kind])} x {kind}, such as {kinds[kind][0]['adapter_id']}: {kinds[kind][0]['reason']}" for kind in order]
    left = sum(len(kinds[kind]) for kind in order[MAX_KINDS:])
    return lines[:MAX_KINDS] + ([f"{left} x other reasons; all are in catalogue.parquet"] if left else [])


def _rows_folder(run: Run) -> Folder:
    """Where rows are kept for the next index of this base by these checks: beside the scores, where runs share these."""
    store, base = run.config.search.store, run.config.base
    home = Folder.at(store) if store else run.folder
    return home.sub("rows", digest(CHECKS, str(KEPT), peft.__version__, fingerprint(base), name_of(base)))
