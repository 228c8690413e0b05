"""Pool -> catalogue: checks every adapter that a pool lists, and keeps it or sets it aside with the reason."""

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from pipeline.adapters.adapter import Adapter, Indexed, content_hash, file_sha256, hash_of, plain, read_adapter, write_adapter
from pipeline.adapters.cache import AdapterCache
from pipeline.adapters.card import read_card, texts
from pipeline.adapters.checkpoint import factor_checkpoint, is_checkpoint
from pipeline.adapters.fetch import MAX_ADAPTER_BYTES, FetchError
from pipeline.adapters.kept_rows import KEPT, Blocks, KeptRows
from pipeline.adapters.licences import declared_licence
from pipeline.adapters.low_rank import rounding_error
from pipeline.adapters.peft_names import refuses
from pipeline.adapters.pool import LOOKED_AT, Listed, look_at
from pipeline.adapters.saved_layers import about_saved, refused_by
from pipeline.adapters.spectrum import NEAR_DIRECTION, SAME_SIZE, families, outliers, sketch, spectrum
from pipeline.adapters.uncalled_part import what_is_left_out, without_uncalled
from pipeline.adapters.validation import (
    Declared,
    as_called,
    called_otherwise,
    check_declared,
    largest_adapter,
    read_declared,
    unknown_fields,
)
from pipeline.cluster.telemetry import worker_log
from pipeline.core.base_ref import name_of
from pipeline.core.errors import MAX_REASON, AdapterError, InputError, for_display, is_transient, one_line
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder, without_secret
from pipeline.core.tables import BASE_ID, CATALOGUE, INSPECTED, require
from pipeline.model.base_model import QUANTISED_NAME, Shapes, linear_shapes, model_type
from pipeline.model.uncalled_layers import uncalled_layers

CHECKS = 6
"""To be raised by a change of what is checked in an adapter or found in it, spectrum and sketch included: what was kept is void
then."""

MAX_NORM = 1e15
"""Of a module's delta weight, by its factors' norms: far beyond any honest one, and squares of such still fit into float32."""


MAX_ROUNDING = 0.1
"""By how much of its norm a delta weight may change in bfloat16; honest ones lose some 0.003."""

ADAPTERS_PER_TASK, MAX_TASKS = 16, 256
"""A task checks so many adapters, and more in a large pool: Ray Data keeps a record of each task in the driver's memory. It keeps
the rows of so many as soon as it has them. To import what a check needs takes a process as long as to check some twenty."""


def build_catalogue(
    base: str,
    pool: str,
    factored: str | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
    found: Sequence[Listed] | None = None,
    kept: KeptRows | None = None,
    engine: str = "vllm",
) -> pa.Table:
    """Check every adapter of `pool` against `base`, in parallel by Ray Data. Rows are sorted by adapter_id.

    Args:
        engine: what is to score them, as in `search.engine`.
        factored: folder for the adapters that full checkpoints of the pool are made into; without it they are set aside.
        count: told how many adapters of how many are checked, as it goes.
        found: what `look_at` found, where it looked before.
        kept: of adapters that are in it, and as they were, the rows are taken from there; what is found of others is added.

    Raises:
        InputError: the pool or the base cannot be read, or no adapter is valid.
    """
    shapes, head = linear_shapes(base)
    found = look_at(pool).found if found is None else found
    parts = [kept.of(found) if kept else KEPT.empty_table()]
    known = set(parts[0]["adapter_id"].to_pylist())
    left = pa.Table.from_pylist([one._asdict() for one in found if one.adapter_id not in known], schema=LOOKED_AT)
    given: dict[str, Any] = {
        "factored": factored,
        "base": base,
        "shapes": shapes,
        "head": head,
        "uncalled": uncalled_layers(base) if len(left) else [],
    }
    given |= {"salt": kept.salt if kept else secrets.randbits(62), "blocks": kept and kept.blocks}
    if known:
        count(len(known), len(found))
    for part in _inspected(left, given):
        parts.append(part)
        count(sum(map(len, parts)), len(found))
    rows = pa.concat_tables(parts).sort_by("adapter_id")
    if kept:
        kept.merge_files(rows)
    catalogue = compare_adapters(rows, engine)
    _require_valid(catalogue, pool)
    return catalogue


def _inspected(left: pa.Table, given: dict[str, Any]) -> Iterable[pa.Table]:
    """Rows of schema KEPT of those of schema LOOKED_AT, as the tasks give them."""
    if not len(left):
        return ()
    per_task = max(ADAPTERS_PER_TASK, math.ceil(len(left) / MAX_TASKS))
    tasks = ray.data.from_arrow(left).repartition(target_num_rows_per_block=per_task)
    rows = tasks.map_batches(inspect_batch, batch_format="pyarrow", fn_kwargs=given)
    return rows.iter_batches(batch_format="pyarrow", batch_size=None)


def valid_adapters_of(run: Folder) -> pa.Table:
    """The valid adapters of a run's pool, schema CATALOGUE.

    Raises:
        ValueError: the catalogue lacks a column.
    """
    return valid_adapters(require(run.read_table("catalogue.parquet"), CATALOGUE, "catalogue.parquet"))


def valid_adapters(catalogue: pa.Table) -> pa.Table:
    """The rows of those that can be donors."""
    return catalogue.filter(pc.equal(catalogue["status"], "ok"))


def indexed_by_id(catalogue: pa.Table) -> dict[str, Indexed]:
    """Where each adapter is, and what it was."""
    columns = (catalogue[name].to_pylist() for name in ("adapter_id", "uri", "adapter_hash"))
    return {name: Indexed(uri, content) for name, uri, content in zip(*columns, strict=True)}


def inspect_batch(
    batch: pa.Table,
    factored: str | None,
    base: str,
    shapes: Shapes,
    head: str | None,
    salt: int,
    uncalled: Collection[str] = (),
    blocks: Blocks | None = None,
) -> pa.Table:
    """Rows of schema KEPT of a batch of schema LOOKED_AT; they are put into `blocks` as they are found."""
    inspector = Inspector(base, shapes, head, factored, salt, frozenset(uncalled))
    listed, rows = [Listed(**row) for row in batch.to_pylist()], list[dict[str, Any]]()
    limit = min(largest_adapter(shapes), MAX_ADAPTER_BYTES)
    with closing(AdapterCache(max_adapter_bytes=limit, check=inspector.refuse)) as cache:
        for start in range(0, len(listed), ADAPTERS_PER_TASK):
            cache.prefetch(one.uri for one in listed[start:] if one.problem is None)
            block = [inspector.inspect(one, cache) for one in listed[start : start + ADAPTERS_PER_TASK]]
            if blocks:
                blocks.add(block)
            rows += block
    for row in rows:
        if row["status"] != "ok":
            worker_log("index", for_display(row["adapter_id"], MAX_REASON)).warning("set aside: %s", row["reason"])
    return pa.Table.from_pylist(rows, schema=KEPT)


class RefusedError(AdapterError):
    """An adapter cannot be a donor, by what its files declare; `card`: the columns of its row that its card gives."""

    def __init__(self, reason: str, card: dict[str, Any]) -> None:
        super().__init__(reason)
        self.card = card


@dataclass(frozen=True)
class Inspector:
    """Checks adapters against one base."""

    base: str
    shapes: Shapes
    head: str | None
    factored: str | None
    salt: int
    """See `spectrum.sketch`."""
    uncalled: frozenset[str] = frozenset()
    """Of `shapes` those that no adapter acts on: `model/uncalled_layers.py`."""

    @cached_property
    def model_type(self) -> str:
        return model_type(self.base)

    def refuse(self, folder: Path) -> None:
        """Look at config and header of an adapter before its weights are fetched.

        Raises:
            RefusedError: they are enough to set it aside.
        """
        try:
            declared = read_declared(folder)
            check_declared(declared, as_called(self.shapes, called_otherwise(declared, self.shapes)), self.head)
            self._require_accepted(declared.sizes)
        except AdapterError as error:
            raise RefusedError(str(error), _of_card(folder)) from error.__cause__
        except Exception:
            return  # `inspect` meets it, too, and says it

    def inspect(self, listed: Listed, cache: AdapterCache) -> dict[str, Any]:
        """A row of schema KEPT: what the adapter is, or why it is set aside."""
        row: dict[str, Any] = {"adapter_id": listed.adapter_id, "uri": listed.uri, "status": "ok", "salt": self.salt}
        row["downloads"] = listed.downloads
        row["state"] = None  # until all that is in the row is the adapter's own
        if listed.problem:
            return row | _set_aside(listed.problem)
        try:
            with cache.lease(listed.uri) as folder:
                row |= _of_card(folder)
                if is_checkpoint(folder):  # what it is made into goes with this run
                    listed = listed._replace(state=None)
                    return row | self._factor(listed.adapter_id, folder)
                declared = read_declared(folder)
                beginnings = called_otherwise(declared, self.shapes)
                read = read_adapter(folder, as_called(self.shapes, beginnings), self.head, self.base)
                self._require_accepted(read.modules)
                adapter = without_uncalled(read, as_called(dict.fromkeys(self.uncalled, (0, 0)), beginnings), self.model_type)
                warnings = [_begun_otherwise(beginnings), _other_base(adapter, self.base), _of_newer_peft(unknown_fields(folder))]
                warnings += [about_saved(declared, adapter.whole), _of_other_senses(declared), what_is_left_out(read, adapter)]
                row["warning"] = "; ".join(filter(None, warnings)) or None
                if beginnings or adapter is not read:  # what it is made into goes with this run
                    listed = listed._replace(state=None)
                    return row | self._rewritten(listed.adapter_id, adapter, beginnings or ("", ""))
                row |= _describe(folder / WEIGHTS_FILE, adapter) | self._looks(adapter)
                pa.Table.from_pylist([row], schema=INSPECTED)  # a value of another type would stop the whole batch
        except AdapterError as error:
            card = error.card if isinstance(error, RefusedError) else {}
            return row | card | _set_aside(str(error)) | {"state": listed.state if _is_final(error) else None}
        except Exception as error:  # what no check foresaw in one adapter must not stop the others
            if is_transient(error):
                raise
            worker_log("index", for_display(listed.adapter_id, MAX_REASON)).exception("the check failed")
            return row | _set_aside(str(AdapterError(f"cannot be checked ({one_line(error)})")))
        return row | {"state": listed.state}

    def _require_accepted(self, modules: Iterable[str]) -> None:
        """See to it that an adapter can be put on the base, to be scored and trained.

        Raises:
            AdapterError: PEFT refuses one of its modules.
        """
        if found := next((module for module in modules if refuses(self.model_type, module)), None):
            leaf = found.rpartition(".")[2]
            raise AdapterError(f"adapts {leaf} layers ({found}), which PEFT refuses in a base of type {self.model_type}")

    def _factor(self, adapter_id: str, folder: Path) -> dict[str, Any]:
        """Make a full checkpoint into an adapter, which the row is then of."""
        if self.factored is None:
            raise AdapterError("a full checkpoint, and there is no folder to factor it into")
        acted_on = {module: shape for module, shape in self.shapes.items() if module not in self.uncalled}
        accepted = {module: shape for module, shape in acted_on.items() if not refuses(self.model_type, module)}
        found = factor_checkpoint(folder, self.base, accepted, self.head)
        return self._written(adapter_id, found.adapter) | {"warning": found.describe()}

    def _rewritten(self, adapter_id: str, adapter: Adapter, beginnings: tuple[str, str]) -> dict[str, Any]:
        """Write an adapter with the base's names for its layers, for engines and merges, and give what the row then is of."""
        theirs, ours = beginnings
        same = plain(adapter)
        tensors = {ours + module.removeprefix(theirs): pair for module, pair in same.tensors.items()}
        config = same.config
        config.target_modules, config.base_model_name_or_path = set(tensors), adapter.config.base_model_name_or_path
        return self._written(adapter_id, Adapter(config, tensors, whole=same.whole))

    def _written(self, adapter_id: str, adapter: Adapter) -> dict[str, Any]:
        """Put an adapter that was made from what the pool holds into the folder for such, and give what the row then is of."""
        if self.factored is None:
            raise AdapterError("it must be rewritten, and there is no folder for it")
        target, name = Folder.at(self.factored), hashlib.sha256(adapter_id.encode()).hexdigest()[:32]  # an id may hold ../
        with temporary_folder() as scratch:
            write_adapter(scratch, adapter, base=self.base)
            target.upload(scratch, name)
            about = _describe(scratch / WEIGHTS_FILE, adapter) | {"adapter_hash": hash_of(scratch)}
        return about | self._looks(adapter) | {"uri": target.sub(name).uri}

    def _looks(self, adapter: Adapter) -> dict[str, Any]:
        """What adapters are compared by.

        Raises:
            AdapterError: a number in its delta weights is too large for float32.
        """
        for module in adapter.modules:
            delta = adapter.factors(module)
            if not float(delta.a_RI.double().norm() * delta.b_OR.double().norm()) < MAX_NORM:
                raise AdapterError(f"weights too large: the delta weight of {module} may have a norm of more than {MAX_NORM:.0e}")
            if (lost := rounding_error(delta)) > MAX_ROUNDING:
                raise AdapterError(f"its factors cancel: rounded to bfloat16, the delta weight of {module} changes by {lost:.0%}")
        for name, change in adapter.whole.items():
            if not float(change.norm(dtype=torch.float64)) < MAX_NORM:
                raise AdapterError(f"weights too large: the change of {name} may have a norm of more than {MAX_NORM:.0e}")
        return {"sketch": sketch(adapter, self.salt), "figures": spectrum(adapter), "whole": sorted(adapter.whole)}


def _set_aside(reason: str) -> dict[str, Any]:
    return {"status": "set_aside", "reason": reason, "warning": None}


def _is_final(error: AdapterError) -> bool:
    """Whether an adapter is set aside for what its files hold, and not for what was in the way to them, or who may read them."""
    return not isinstance(error, FetchError) and not isinstance(error.__cause__, OSError)


def _of_card(folder: Path) -> dict[str, Any]:
    card = read_card(folder)
    return {"license": declared_licence(card), "datasets": texts(card.get("datasets")) or []}


def _describe(weights: Path, adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    digest = file_sha256(weights)
    return {
        "sha256": digest,
        "adapter_hash": content_hash(digest, config),
        "base_model": config.base_model_name_or_path,
        "rank": adapter.max_rank,
        "alpha": float(config.lora_alpha),
        "use_rslora": bool(config.use_rslora),
        "target_modules": adapter.target_leaves,
        "bytes": weights.stat().st_size,
    }


def _other_base(adapter: Adapter, base: str) -> str | None:
    """Shapes decide; a base of another name is worth a word, as a local folder seldom bears its Hub id."""
    claimed = adapter.config.base_model_name_or_path
    if not claimed or _plain_name(claimed) == _plain_name(name_of(base)):
        return None
    return f"says that it was trained on {without_secret(claimed)}; its shapes fit {name_of(base)}"


def _plain_name(base: str) -> str:
    """A base's name without its owner, and without what copies in fewer bits add to it."""
    return QUANTISED_NAME.sub("", Path(base).name.lower())


def _begun_otherwise(beginnings: tuple[str, str] | None) -> str | None:
    return beginnings and "its layers' names begin with {!r}, the base's with {!r}".format(*beginnings)


def _of_other_senses(declared: Declared) -> str | None:
    return "its layers for pictures or sounds change nothing and are left out" if declared.other_senses else None


def _of_newer_peft(fields: list[str]) -> str | None:
    if not fields:
        return None
    return f"fields of its config that this version of PEFT does not know are not heeded: {for_display(', '.join(fields), 100)}"


def compare_adapters(table: pa.Table, engine: str = "vllm") -> pa.Table:
    """The catalogue of inspected rows (schema INSPECTED): of several valid adapters with equal delta weights the first is kept;
    those of one direction and another size are told as a family, and unusual ones get a warning. What the engine cannot score is
    set aside."""
    rows = table.to_pylist()
    first: dict[str, str] = {}
    for row in rows:
        if row["adapter_id"] == BASE_ID:
            row |= {"status": "set_aside", "reason": f"its id is {BASE_ID!r}, which stands for the base model; rename it"}
        if row["status"] == "ok" and (reason := refused_by(engine, row["whole"] or [])):
            row |= _set_aside(reason)
        if row["status"] != "ok":
            continue
        original = first.setdefault(row["adapter_hash"], row["adapter_id"])
        if original != row["adapter_id"]:
            row |= {"status": "set_aside", "reason": f"duplicate of {original}: same weights and scaling"}
    valid = [row for row in rows if row["status"] == "ok"]
    if valid:
        _tell_families(valid)
        _flag(valid, outliers(np.array([row["figures"] for row in valid])))
    return pa.Table.from_pylist([{name: row[name] for name in CATALOGUE.names} for row in rows], schema=CATALOGUE)


def _tell_families(valid: list[dict[str, Any]]) -> None:
    sketches_NJ = np.array([row["sketch"] for row in valid])
    first, sizes = families(sketches_NJ)
    near, _ = families(sketches_NJ, NEAR_DIRECTION)
    warnings: dict[int, str] = {}
    for place, (one, size) in enumerate(zip(first, sizes, strict=True)):
        name, like = valid[one]["adapter_id"], valid[near[place]]["adapter_id"]
        valid[place]["family"] = like
        if one != place and abs(size - 1) < SAME_SIZE:
            valid[place] |= {"status": "set_aside", "reason": f"duplicate of {name}: the same delta weights in other factors"}
        elif one != place:
            warnings[place] = f"its delta weights are those of {name} times {size:.3g}; a merge takes the better one of the two"
        elif near[place] != place:
            warnings[place] = f"its delta weights are nearly those of {like}; a merge takes the better one of the two"
        elif not any(valid[place]["sketch"]):
            warnings[place] = "its delta weights are zero: it is the base"
    _flag(valid, warnings)


def _flag(rows: list[dict[str, Any]], warnings: Mapping[int, str]) -> None:
    for place, warning in warnings.items():
        rows[place]["warning"] = "; ".join(filter(None, [rows[place]["warning"], warning]))


def _require_valid(catalogue: pa.Table, pool: str) -> None:
    if pc.any(pc.equal(catalogue["status"], "ok")).as_py():
        return
    reasons = Counter(reason.partition(":")[0] for reason in catalogue["reason"].to_pylist())
    summary = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    raise InputError(
        f"{pool}: none of its {len(catalogue)} adapters is valid ({summary}); see {CONFIG_FILE} and {WEIGHTS_FILE} there"
    )
