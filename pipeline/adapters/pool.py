"""Adapters -> catalogue: find every adapter of a pool, check each, keep it or set it aside with the reason.

A pool is a folder of PEFT adapters at any depth, a list file (one path, Hub id or object-store URI a line, # starts a comment)
or an object-store prefix. A path in a list file is relative to it, and stays in its folder: whoever wrote the list decides
about nothing else on the machines that read it.
"""

import hashlib
import math
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import fs

from pipeline.adapters.adapter import (
    CONFIG_FILE,
    FILES,
    WEIGHTS_FILE,
    Adapter,
    content_hash,
    file_sha256,
    read_adapter,
    write_adapter,
)
from pipeline.adapters.cache import AdapterCache
from pipeline.adapters.card import read_card, texts
from pipeline.adapters.checkpoint import INDEX_FILE, factor_checkpoint, is_checkpoint
from pipeline.adapters.fetch import HUB, MAX_ADAPTER_BYTES
from pipeline.adapters.licences import declared_licence
from pipeline.adapters.low_rank import rounding_error
from pipeline.adapters.spectrum import NEAR_DIRECTION, SAME_SIZE, families, outliers, sketch, spectrum
from pipeline.adapters.validation import largest_adapter, unknown_fields
from pipeline.cluster.telemetry import worker_log
from pipeline.core.errors import MAX_REASON, AdapterError, InputError, may_pass, one_line, shown
from pipeline.core.storage import MAX_PATH, NO_SECRET, Folder, has_secret, is_path, is_text, without_secret
from pipeline.core.tables import BASE_ID, CATALOGUE, INSPECTED
from pipeline.model.base_model import Shapes, linear_shapes

LISTING = pa.schema([("adapter_id", pa.string()), ("uri", pa.string()), ("problem", pa.string())])
Listing = dict[str, list[str | None]]
"""Columns LISTING."""

READ = (*FILES, "config.json", INDEX_FILE)
"""What is read of an adapter or a full checkpoint, beside its *.safetensors."""

REMOTE = (HUB, "s3://", "gs://", "gcs://")
"""What a list file may name beside the paths in its folder."""

COMMENT = re.compile(r"(^|\s)#.*")
"""In a list file; a name may have the sign in it."""

MAX_ID = 1000
"""Characters."""

MAX_NAME = 255
"""Bytes of one part of a path."""

MAX_NORM = 1e15
"""Of a module's delta weight, by its factors' norms: far beyond any honest one, and squares of such still fit into float32."""

MAX_ROUNDING = 0.1
"""By how much of its norm a delta weight may change in bfloat16; honest ones lose some 0.003."""

ADAPTERS_PER_TASK, MAX_TASKS = 8, 256
"""A task checks so many adapters, and more in a large pool: Ray Data keeps a record of each task in the driver's memory."""


class Listed(NamedTuple):
    """An entry of a pool, and why it is not even looked at, if so."""

    adapter_id: str
    uri: str
    problem: str | None = None


def build_catalogue(
    base: str,
    pool: str,
    factored: str | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
    listing: Listing | None = None,
) -> pa.Table:
    """Check every adapter of `pool` against `base`, in parallel by Ray Data. Rows are sorted by adapter_id.

    Args:
        factored: folder for the adapters that full checkpoints of the pool are made into; without it they are set aside.
        count: told how many adapters of how many are checked, as it goes.
        listing: what `list_adapters` gave, where it was asked before.

    Raises:
        InputError: the pool or the base cannot be read, or no adapter is valid.
    """
    shapes, head = linear_shapes(base)
    given = {"factored": factored, "base": base, "shapes": shapes, "head": head, "salt": secrets.randbits(62)}
    found = pa.table(listing or list_adapters(pool), schema=LISTING)
    rows = (
        ray.data.from_arrow(found)
        .repartition(target_num_rows_per_block=max(ADAPTERS_PER_TASK, math.ceil(len(found) / MAX_TASKS)))
        .map_batches(inspect_batch, batch_format="pyarrow", fn_kwargs=given)
    )
    parts: list[pa.Table] = []
    for part in rows.iter_batches(batch_format="pyarrow", batch_size=None):
        parts.append(part)
        count(sum(map(len, parts)), len(found))
    catalogue = compare(pa.concat_tables(parts).sort_by("adapter_id"))
    _require_valid(catalogue, pool)
    return catalogue


def valid_adapters(catalogue: pa.Table) -> pa.Table:
    """The rows of those that can be donors."""
    return catalogue.filter(pc.equal(catalogue["status"], "ok"))


def list_adapters(pool: str, exclude: Sequence[str] = ()) -> Listing:
    """Columns LISTING of everything in a pool that may be an adapter; `problem` says of some why they are not looked at.

    Args:
        exclude: ids to leave out, with the wildcards of a shell.

    Raises:
        InputError: there is no such pool, it is empty, or two lines of a list file give the same id.
        OSError: its disk or store does not answer.
    """
    folder = Folder.at(pool)
    try:
        kind = folder.files.get_file_info(folder.path).type
    except OSError as error:
        if may_pass(error):
            raise
        raise InputError(f"{pool}: the adapter pool cannot be reached ({error})") from error
    if kind == fs.FileType.File:
        found = _from_list(folder)
    elif kind == fs.FileType.Directory:
        found = _from_folder(folder)
    else:
        raise InputError(f"{pool}: no such adapter pool; give a folder, a list file or an object-store prefix")
    if not found:
        raise InputError(f"{pool}: no adapter found; a pool holds folders with {CONFIG_FILE} and {WEIGHTS_FILE}")
    found = [_shown(_excluded(_named(one), exclude)) for one in found]
    return {name: [getattr(one, name) for one in found] for name in LISTING.names}


def inspect_batch(batch: pa.Table, factored: str | None, base: str, shapes: Shapes, head: str | None, salt: int) -> pa.Table:
    """Rows of schema INSPECTED of a batch of schema LISTING."""
    inspector = Inspector(base, shapes, head, factored, salt)
    listed = [Listed(**row) for row in batch.to_pylist()]
    with closing(AdapterCache(max_adapter_bytes=min(largest_adapter(shapes), MAX_ADAPTER_BYTES))) as cache:
        cache.prefetch(one.uri for one in listed if one.problem is None)
        rows = [inspector.inspect(one, cache) for one in listed]
    for row in rows:
        if row["status"] != "ok":
            worker_log("index", shown(row["adapter_id"], MAX_REASON)).warning("set aside: %s", row["reason"])
    return pa.Table.from_pylist(rows, schema=INSPECTED)


@dataclass(frozen=True)
class Inspector:
    """Checks adapters against one base."""

    base: str
    shapes: Shapes
    head: str | None
    factored: str | None
    salt: int
    """See `spectrum.sketch`."""

    def inspect(self, listed: Listed, cache: AdapterCache) -> dict[str, Any]:
        """A catalogue row: what the adapter is, or why it is set aside."""
        row: dict[str, Any] = {"adapter_id": listed.adapter_id, "uri": listed.uri, "status": "ok"}
        if listed.problem:
            return row | {"status": "set_aside", "reason": listed.problem}
        try:
            with cache.lease(listed.uri) as folder:
                card = read_card(folder)
                row |= {"license": declared_licence(card), "datasets": texts(card.get("datasets")) or []}
                if is_checkpoint(folder):
                    return row | self._factor(listed.adapter_id, folder)
                adapter = read_adapter(folder, self.shapes, self.head)
                row |= _describe(folder / WEIGHTS_FILE, adapter) | self._looks(adapter)
                unknown = unknown_fields(folder)
                pa.Table.from_pylist([row], schema=INSPECTED)  # a value of another type would stop the whole batch
        except AdapterError as error:
            return row | {"status": "set_aside", "reason": str(error)}
        except Exception as error:  # what no check foresaw in one adapter must not stop the others
            if may_pass(error):
                raise
            worker_log("index", shown(listed.adapter_id, MAX_REASON)).exception("the check failed")
            return row | {"status": "set_aside", "reason": str(AdapterError(f"cannot be checked ({one_line(error)})"))}
        return row | {"warning": "; ".join(filter(None, [_other_base(adapter, self.base), _of_newer_peft(unknown)])) or None}

    def _factor(self, adapter_id: str, folder: Path) -> dict[str, Any]:
        """Make a full checkpoint into an adapter, which the row is then of."""
        if self.factored is None:
            raise AdapterError("a full checkpoint, and there is no folder to factor it into")
        found = factor_checkpoint(folder, self.base, self.shapes, self.head)
        target, name = Folder.at(self.factored), hashlib.sha256(adapter_id.encode()).hexdigest()[:32]  # an id may hold ../
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), found.adapter)
            target.upload(Path(scratch), name)
            about = _describe(Path(scratch) / WEIGHTS_FILE, found.adapter)
        return about | self._looks(found.adapter) | {"uri": target.sub(name).uri, "warning": found.describe()}

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
        return {"sketch": sketch(adapter, self.salt), "figures": spectrum(adapter)}


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
    return f"says that it was trained on {without_secret(claimed)}; its shapes fit {base}"


def _of_newer_peft(fields: list[str]) -> str | None:
    if not fields:
        return None
    return f"fields of its config that this version of PEFT does not know are not heeded: {shown(', '.join(fields), 100)}"


def _excluded(one: Listed, patterns: Sequence[str]) -> Listed:
    pattern = next((pattern for pattern in patterns if fnmatchcase(one.adapter_id, pattern)), None)
    return one if pattern is None else one._replace(problem=f"excluded: the config's exclude names {pattern!r}")


def _named(one: Listed) -> Listed:
    """Names are printed on terminals and pages."""
    if not one.adapter_id.isprintable():
        return Listed(one.adapter_id, one.uri, "its name has control characters; rename it")
    if len(one.adapter_id) > MAX_ID:
        digest = hashlib.sha256(one.adapter_id.encode()).hexdigest()[:8]  # what the cut leaves may be another's
        return Listed(f"{one.adapter_id[:100]}...{digest}", "", f"its name has more than {MAX_ID} characters; rename it")
    return one


def _shown(one: Listed) -> Listed:
    return one if one.problem is None else one._replace(problem=shown(one.problem, MAX_REASON))


def _from_folder(folder: Folder) -> list[Listed]:
    names = {CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"}
    if folder.is_local:  # full checkpoints of an object store are not fetched
        names |= {"model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"}
    parents = {info.path.rpartition("/")[0] for info in folder.walk() if info.base_name in names}
    tails = [tail for parent in sorted(parents) if not _is_hidden(tail := parent.removeprefix(folder.path).strip("/"))]
    root = Path(folder.path).name
    top = Listed("." if root in tails else root, folder.uri)  # the pool may itself be an adapter
    found = [Listed(tail, folder.sub(tail).uri) if tail else top for tail in tails]
    if not folder.is_local:
        return found
    pool = Path(folder.path)
    checked = [one._replace(problem=_leaves(Path(one.uri), pool)) for one in found]
    return sorted([*checked, *_not_entered(pool)], key=lambda one: one.adapter_id)


def _is_hidden(tail: str) -> bool:
    """Whether a folder of a pool is no place for donors: one of git, of a cache or of an archive's leavings."""
    return any(part.startswith(".") or part == "__MACOSX" for part in tail.split("/"))


def _leaves(adapter: Path, pool: Path) -> str | None:
    """Why an adapter in a folder is not looked at: a link among what is read of it leads out of the pool."""
    for file in [adapter, *(adapter / name for name in READ), *adapter.glob("*.safetensors")]:
        if not _is_inside(file, pool):
            return (
                f"{file.name} is a symbolic link that leaves the pool; copy what it leads to, or give the folder that holds both"
            )
    return None


def _not_entered(pool: Path) -> Iterator[Listed]:
    """Folders that the walk over a pool passes over, and that are worth a word."""
    for parent, folders, _ in os.walk(pool):
        for path in (Path(parent) / name for name in folders):
            name = os.fsencode(path.relative_to(pool)).decode(errors="backslashreplace")
            if not is_text(str(path)):
                yield Listed(name, name, "its name is not valid UTF-8; rename it")
            elif not is_path(str(path)):
                yield Listed(name, name, f"its path has more than {MAX_PATH} bytes; move it")
            elif path.is_symlink() and not _is_inside(path, pool):
                yield Listed(name, str(path), "a symbolic link that leaves the pool; copy what it leads to")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, stays in a folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _from_list(file: Folder) -> list[Listed]:
    try:
        text = file.read_text("").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{file.uri}: a list file must be UTF-8 text, one adapter a line ({error})") from error
    lines = [COMMENT.sub("", line).strip() for line in text.split("\n")]
    if shown := next((without_secret(line) for line in lines if has_secret(line)), None):
        raise InputError(f"{file.uri}: {shown!r}: {NO_SECRET}")
    found = [_list_entry(line, Path(file.path).parent, file.is_local) for line in lines if line]
    twice = [name for name, n in Counter(one.adapter_id for one in found).items() if n > 1]
    if twice:
        raise InputError(f"{file.uri}: {twice[0]!r} is listed twice")
    return found


def _list_entry(line: str, parent: Path, is_local: bool) -> Listed:
    if not line.isprintable() or len(line) > MAX_ID:
        return Listed(line, line)  # `list_adapters` says what is wrong
    if "://" in line:
        return Listed(line.removeprefix(HUB), line, _not_remote(line))
    if any(len(part.encode()) > MAX_NAME for part in line.split("/")):
        return Listed(line, line, f"a name of more than {MAX_NAME} bytes, which no file system has")
    path = parent / line
    looks_local = line.startswith((".", "/", "~")) or line.count("/") != 1
    if not is_local or not (path.exists() or looks_local):
        return Listed(line, HUB + line)
    if not _is_inside(path, parent):
        return Listed(line, str(path), f"{line} lies outside of {parent}, the folder of the list file")
    return Listed(line, str(path), _leaves(path, parent))


def _not_remote(uri: str) -> str | None:
    """Why a location in a list is not looked at: its writer decides neither what is read of this machine nor whom that asks."""
    if not uri.startswith(REMOTE):
        return f"not a location that a list file may name ({', '.join(REMOTE)}); give a path relative to the list"
    if "?" in uri:
        return "options of an object store in a list file; set them in the environment, such as AWS_ENDPOINT_URL"
    return None


def compare(table: pa.Table) -> pa.Table:
    """The catalogue of inspected rows (schema INSPECTED): of several valid adapters with equal delta weights the first is kept;
    those of one direction and another size are told as a family, and unusual ones get a warning."""
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
