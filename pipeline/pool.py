"""Adapters -> catalogue: find every adapter of a pool, check each, keep it or set it aside with the reason.

A pool is a folder of PEFT adapters at any depth, a list file (one path, Hub id or object-store URI a line, # starts a comment)
or an object-store prefix.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import fs

from pipeline.basemodel import Shapes, linear_shapes
from pipeline.cache import AdapterCache
from pipeline.errors import AdapterError, InputError
from pipeline.fetch import HUB
from pipeline.merge.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    check_adapter,
    content_hash,
    file_sha256,
    read_adapter,
    write_adapter,
)
from pipeline.merge.factor import factor_checkpoint, is_checkpoint
from pipeline.observe import worker_log
from pipeline.storage import Folder
from pipeline.tables import BASE_ID, CATALOGUE

ADAPTERS_PER_TASK, MAX_TASKS = 8, 256
"""A task checks so many adapters, and more in a large pool: Ray Data keeps a record of each task in the driver's memory."""


def build_catalogue(
    base: str, pool: str, factored: str | None = None, count: Callable[[int, int], None] = lambda done, total: None
) -> pa.Table:
    """Check every adapter of `pool` against `base`, in parallel by Ray Data. Rows are sorted by adapter_id.

    Args:
        factored: folder for the adapters that full checkpoints of the pool are made into; without it they are set aside.
        count: told how many adapters of how many are checked, as it goes.

    Raises:
        InputError: the pool or the base cannot be read, or no adapter is valid.
    """
    shapes, head = linear_shapes(base)
    found = pa.table(list_adapters(pool), schema=pa.schema([("adapter_id", pa.string()), ("uri", pa.string())]))
    rows = (
        ray.data.from_arrow(found)
        .repartition(target_num_rows_per_block=max(ADAPTERS_PER_TASK, math.ceil(len(found) / MAX_TASKS)))
        .map_batches(
            inspect_batch, batch_format="pyarrow", fn_kwargs={"factored": factored, "base": base, "shapes": shapes, "head": head}
        )
    )
    parts: list[pa.Table] = []
    for part in rows.iter_batches(batch_format="pyarrow", batch_size=None):
        parts.append(part)
        count(sum(map(len, parts)), len(found))
    catalogue = _set_duplicates_aside(pa.concat_tables(parts).sort_by("adapter_id"))
    _require_valid(catalogue, pool)
    return catalogue


def valid_adapters(catalogue: pa.Table) -> pa.Table:
    """The rows of those that can be donors."""
    return catalogue.filter(pc.equal(catalogue["status"], "ok"))


def list_adapters(pool: str) -> dict[str, list[str]]:
    """adapter_id and uri of everything in a pool that may be an adapter.

    Raises:
        InputError: there is no such pool, it is empty, or two lines of a list file give the same id.
    """
    folder = Folder.at(pool)
    try:
        kind = folder.files.get_file_info(folder.path).type
    except OSError as error:
        raise InputError(f"{pool}: the adapter pool cannot be reached ({error})") from error
    if kind == fs.FileType.File:
        pairs = _from_list(folder)
    elif kind == fs.FileType.Directory:
        pairs = _from_folder(folder)
    else:
        raise InputError(f"{pool}: no such adapter pool; give a folder, a list file or an object-store prefix")
    if not pairs:
        raise InputError(f"{pool}: no adapter found; a pool holds folders with {CONFIG_FILE} and {WEIGHTS_FILE}")
    return {"adapter_id": [name for name, _ in pairs], "uri": [uri for _, uri in pairs]}


def inspect_batch(batch: pa.Table, factored: str | None, base: str, shapes: Shapes, head: str | None) -> pa.Table:
    """Catalogue rows of a batch of (adapter_id, uri)."""
    inspector = Inspector(base, shapes, head, factored)
    with closing(AdapterCache()) as cache:
        cache.prefetch(batch["uri"].to_pylist())
        rows = [inspector.inspect(row["adapter_id"], row["uri"], cache) for row in batch.to_pylist()]
    for row in rows:
        if row["status"] != "ok":
            worker_log("index", row["adapter_id"]).warning("set aside: %s", row["reason"])
    return pa.Table.from_pylist(rows, schema=CATALOGUE)


@dataclass(frozen=True)
class Inspector:
    """Checks adapters against one base."""

    base: str
    shapes: Shapes
    head: str | None
    factored: str | None

    def inspect(self, adapter_id: str, uri: str, cache: AdapterCache) -> dict[str, Any]:
        """A catalogue row: what the adapter is, or why it is set aside."""
        row: dict[str, Any] = {"adapter_id": adapter_id, "uri": uri, "status": "ok"}
        try:
            with cache.lease(uri) as folder:
                if is_checkpoint(folder):
                    return row | self._factor(adapter_id, folder)
                adapter = read_adapter(folder)
                row |= _describe(folder / WEIGHTS_FILE, adapter)
            check_adapter(adapter, self.shapes, self.head)
        except AdapterError as error:
            return row | {"status": "set_aside", "reason": str(error)}
        return row | {"warning": _other_base(adapter, self.base)}

    def _factor(self, adapter_id: str, folder: Path) -> dict[str, Any]:
        """Make a full checkpoint into an adapter, which the row is then of."""
        if self.factored is None:
            raise AdapterError("a full checkpoint, and there is no folder to factor it into")
        found = factor_checkpoint(folder, self.base, self.shapes, self.head)
        target = Folder.at(self.factored)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), found.adapter)
            target.upload(Path(scratch), adapter_id)
            about = _describe(Path(scratch) / WEIGHTS_FILE, found.adapter)
        return about | {"uri": target.sub(adapter_id).uri, "warning": found.describe()}


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
    if not claimed or Path(claimed).name == Path(base).name:
        return None
    return f"says that it was trained on {claimed}; its shapes fit {base}"


def _from_folder(folder: Folder) -> list[tuple[str, str]]:
    names = {CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"}
    if folder.is_local:  # full checkpoints of an object store are not fetched
        names |= {"model.safetensors", "model.safetensors.index.json"}
    infos = folder.files.get_file_info(fs.FileSelector(folder.path, recursive=True))
    parents = {info.path.rpartition("/")[0] for info in infos if info.is_file and info.base_name in names}
    pairs = []
    for parent in sorted(parents):
        tail = parent.removeprefix(folder.path).strip("/")
        pairs.append((tail or Path(folder.path).name, folder.sub(tail).uri if tail else folder.uri))
    return pairs


def _from_list(file: Folder) -> list[tuple[str, str]]:
    lines = [line.partition("#")[0].strip() for line in file.read_text("").splitlines()]
    pairs = [_list_entry(line, Path(file.path).parent, file.is_local) for line in lines if line]
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise InputError(f"{file.uri}: {twice[0]!r} is listed twice")
    return pairs


def _list_entry(line: str, parent: Path, is_local: bool) -> tuple[str, str]:
    if "://" in line:
        return line.removeprefix(HUB), line
    path = parent / Path(line).expanduser()
    looks_local = line.startswith((".", "/", "~")) or line.count("/") != 1
    if is_local and (path.exists() or looks_local):
        return line, str(path)
    return line, HUB + line


def _set_duplicates_aside(table: pa.Table) -> pa.Table:
    """Keep the first of several valid adapters with equal weights and scaling."""
    rows = table.to_pylist()
    first: dict[str, str] = {}
    for row in rows:
        if row["adapter_id"] == BASE_ID:
            row |= {"status": "set_aside", "reason": f"its id is {BASE_ID!r}, which stands for the base model; rename it"}
        if row["status"] != "ok":
            continue
        original = first.setdefault(row["adapter_hash"], row["adapter_id"])
        if original != row["adapter_id"]:
            row |= {"status": "set_aside", "reason": f"duplicate of {original}: same weights and scaling"}
    return pa.Table.from_pylist(rows, schema=table.schema)


def _require_valid(catalogue: pa.Table, pool: str) -> None:
    if pc.any(pc.equal(catalogue["status"], "ok")).as_py():
        return
    reasons = Counter(reason.partition(":")[0] for reason in catalogue["reason"].to_pylist())
    summary = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    raise InputError(
        f"{pool}: none of its {len(catalogue)} adapters is valid ({summary}); see {CONFIG_FILE} and {WEIGHTS_FILE} there"
    )
