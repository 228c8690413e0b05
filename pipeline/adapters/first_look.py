"""What the adapters of a pool declare, before one of them is checked: enough to start an engine that has room for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.adapters.pool import REMOTE, Listed
from pipeline.adapters.validation import as_called, called_otherwise, check_declared, read_declared
from pipeline.core.tables import CATALOGUE
from pipeline.model.base_model import Shapes, linear_shapes

MOST = 256
"""Adapters that are looked at: of more, reading config and header takes seconds, in which nothing else is done."""

DECLARED = pa.schema([CATALOGUE.field(name) for name in ("adapter_id", "rank", "target_modules")])


def first_look(found: Sequence[Listed], base: str) -> pa.Table:
    """Rank and target modules, schema DECLARED, of the adapters on this machine that may be donors by config and header. Whoever
    can be none is left out without a word: the check says why. Empty where some lie elsewhere, or there are too many."""
    here = [one for one in found if one.problem is None]
    if len(here) > MOST or any(one.uri.startswith(REMOTE) for one in here):
        return DECLARED.empty_table()
    shapes, head = linear_shapes(base)
    return pa.Table.from_pylist([row for one in here if (row := _declared(one, shapes, head))], schema=DECLARED)


def _declared(one: Listed, shapes: Shapes, head: str | None) -> dict[str, Any] | None:
    try:
        declared = read_declared(Path(one.uri))
        check_declared(declared, as_called(shapes, called_otherwise(declared, shapes)), head)
    except Exception:  # of whatever kind: the check meets it, too
        return None
    leaves = {module.rpartition(".")[2] for module in declared.sizes}
    return {"adapter_id": one.adapter_id, "rank": max(map(declared.rank, declared.sizes)), "target_modules": sorted(leaves)}
