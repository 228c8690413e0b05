"""Lists what a pool holds; `catalogue.py` checks it.

A pool is a folder of PEFT adapters at any depth, an object-store prefix, a place on the Hub (`hub_pool.py`) or a list file: one
path, Hub id (ORG/NAME[@REVISION][/FOLDER]) or object-store URI a line; # starts a comment. A path in a list file is relative to
it, and stays in its folder: whoever wrote the list decides about nothing else on the machines that read it.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from pipeline.adapters.hub_pool import adapters_on_hub
from pipeline.core.errors import MAX_REASON, InputError, for_display, is_transient
from pipeline.core.file_names import CONFIG_FILE, FILES, INDEX_FILE, PICKLES, WEIGHTS_FILE
from pipeline.core.hub import HUB, Place
from pipeline.core.hub_api import commit_of
from pipeline.core.ledger import digest
from pipeline.core.storage import MAX_PATH, NO_SECRET, Folder, has_secret, is_path, is_text, without_secret

LISTING = pa.schema([("adapter_id", pa.string()), ("uri", pa.string()), ("problem", pa.string())])
Listing = dict[str, list[str | None]]
"""Columns LISTING."""

LOOKED_AT = pa.schema([*LISTING, ("state", pa.string()), ("downloads", pa.int64())])

READ = (*FILES, "config.json", INDEX_FILE)
"""What is read of an adapter or a full checkpoint, beside its *.safetensors."""

REMOTE = (HUB, "s3://", "gs://", "gcs://")
"""What a list file may name beside the paths in its folder."""

COMMENT = re.compile(r"(^|\s)#.*")
"""In a list file; a name may have the sign in it."""

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The folder of a step on the way, as transformers' trainer names it."""

FINAL = re.compile(r"final([_-](adapter|checkpoint|lora|model))?")
"""The folder beside such steps that scripts around a trainer save the adapter to."""

REVISION = re.compile(r"[^./~][^/]*/[^/]+@")
"""Begins a Hub id with a revision, behind which a folder may follow."""

A_CHECKPOINT = "a checkpoint"
"""Begins the reason for which one is left out."""

MAX_ID = 1000
"""Characters."""

LOOKED_AT_ONCE = 32
"""Adapters of a list file."""

MAX_NAME = 255
"""Bytes of one part of a path."""

SETTLED = 5 * 10**9
"""Nanoseconds. What was written so short a time ago may be written again within the second, and stores tell whole seconds; clocks
differ, too."""


class Listed(NamedTuple):
    """An entry of a pool, and why it is not even looked at, if so. `state`: differs once a file that it is judged by has changed;
    None: that cannot be told. `downloads`: of the Hub's."""

    adapter_id: str
    uri: str
    problem: str | None = None
    state: str | None = None
    downloads: int | None = None


@dataclass(frozen=True)
class Pool:
    """What one look at a pool gives; no content is read but that of a list file. `state` is that of `pool_state`."""

    found: list[Listed]
    state: list[Any]

    @property
    def listing(self) -> Listing:
        return _columns(self.found)


def look_at(pool: str, exclude: Sequence[str] = (), checkpoints: bool = True) -> Pool:
    """List a pool, and look at the files' states.

    Args:
        exclude: ids to leave out, with the wildcards of a shell.
        checkpoints: whether checkpoint-NNN folders of an adapter that is itself in the pool are adapters, too.

    Raises:
        InputError: there is no such pool, it is empty, or two lines of a list file give the same id.
        OSError: its disk, its store or the Hub does not answer.
    """
    found, state = _look(pool, _required_kind)
    return Pool(_checked(pool, found, exclude, checkpoints), state)


def pool_state(pool: str) -> list[Any]:
    """What differs once an adapter of a pool has changed: names, sizes and times of all files, of those that a list file names,
    too; of the Hub's the commit. No content is read.

    Raises:
        InputError: the list file is malformed, or there is no such pool on the Hub.
        OSError: a store does not answer, or takes nobody's credentials.
    """
    return _look(pool, _kind)[1]


def _look(pool: str, kind_of: Callable[[str], fs.FileType]) -> tuple[list[Listed], list[Any]]:
    """What is in a pool, and the state of it; where there is none, nothing."""
    if pool.startswith(HUB):
        seen = adapters_on_hub(pool)
        found = [Listed(one.adapter_id, one.place.uri, None, one.place.revision, one.downloads) for one in seen]
        return found, sorted(one.uri for one in found)
    folder, kind = Folder.at(pool), kind_of(pool)
    if kind == fs.FileType.File:
        return _from_list(folder)
    infos = folder.walk() if kind == fs.FileType.Directory else []
    return _from_folder(folder, infos), sorted((info.path, info.size, info.mtime_ns) for info in infos)


def _kind(pool: str) -> fs.FileType:
    folder = Folder.at(pool)
    return folder.files.get_file_info(folder.path).type


def _required_kind(pool: str) -> fs.FileType:
    """Whether a pool is a folder or a list file; it must be one of them."""
    try:
        kind = _kind(pool)
    except OSError as error:
        if is_transient(error):
            raise
        raise InputError(f"{pool}: the adapter pool cannot be reached ({error})") from error
    if kind not in (fs.FileType.File, fs.FileType.Directory):
        raise InputError(f"{pool}: no such adapter pool; give a folder, a list file, s3://... or hf://...")
    return kind


def _checked(pool: str, found: list[Listed], exclude: Sequence[str], checkpoints: bool) -> list[Listed]:
    if not found:
        raise InputError(f"{pool}: no adapter found; a pool holds folders with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not checkpoints:
        finals = _finals(found)
        found = [_without_final(one, finals) for one in found]
    return [_shown(_excluded(_named(one), exclude)) for one in found]


def _finals(found: list[Listed]) -> dict[str, str]:
    """Folders -> what the steps in them led to: the adapter of the folder itself, or else the one in it that is called the final
    one. Others beside the steps may be of other runs, and so may all that lies in the pool's own folder."""
    named = {_parent(one.uri): _name(one.uri) for one in found if "/" in one.adapter_id and FINAL.fullmatch(_name(one.uri))}
    return named | {one.uri: _name(one.uri) for one in found}


def _without_final(one: Listed, finals: Mapping[str, str]) -> Listed:
    """Trainers leave the steps on the way beside what they end with: near copies, of which one is enough."""
    final = finals.get(_parent(one.uri))
    if one.problem or final is None or not CHECKPOINT.fullmatch(_name(one.uri)):
        return one
    return one._replace(problem=f"{A_CHECKPOINT} of {final}, which is in the pool; checkpoints: include takes it")


def _parent(uri: str) -> str:
    path, mark, options = uri.partition("?")
    return path.rpartition("/")[0] + mark + options


def _name(uri: str) -> str:
    return uri.partition("?")[0].rpartition("/")[2]


def _columns(found: list[Listed]) -> Listing:
    return {name: [getattr(one, name) for one in found] for name in LISTING.names}


def _looked_at(entries: list[Listed]) -> tuple[list[Listed], list[Any]]:
    """Entries of a list file with their states, and the state of all of them."""
    with ThreadPoolExecutor(LOOKED_AT_ONCE) as threads:
        seen = list(threads.map(_look_at_one, entries))
    return [one for one, _ in seen], [(one.uri, state) for one, (_, state) in zip(entries, seen, strict=True) if not one.problem]


def _look_at_one(one: Listed) -> tuple[Listed, Any]:
    """An entry of a list file with its state, and what that is of a pool's. What is wrong with an adapter is said by the index;
    what may pass is not taken for a state of it."""
    if one.problem:
        return one, None
    try:
        if place := one.uri.startswith(HUB) and Place.of(one.uri):
            commit = place.revision if place.is_pinned else commit_of(place.repo, place.revision, place.file(CONFIG_FILE))
            return one._replace(uri=place._replace(revision=commit).uri, state=commit), commit
        folder = Folder.at(one.uri)
        found = folder.files.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    except (InputError, OSError, ValueError) as error:
        if is_transient(error):
            raise
        return one, type(error).__name__
    wanted = (info for info in found if info.base_name in READ or info.base_name.endswith(".safetensors"))
    state = sorted((info.base_name, info.size, info.mtime_ns) for info in wanted)
    return one._replace(state=files_state(found, folder.is_local)), state


def files_state(infos: Iterable[fs.FileInfo], local: bool) -> str | None:
    """The state of an adapter, given the files of its folder; None: one was written just now, or the store tells no time. A
    pickle is not read, but may be the reason why it is set aside.

    Of a disk also when a file was last changed in any way: unlike the time that it bears nobody can set that.
    """
    wanted = [info for info in infos if info.is_file and info.base_name.endswith((*READ, ".safetensors", *PICKLES))]
    now, stamps = time.time_ns(), sorted((info.base_name, info.size, info.mtime_ns) for info in wanted)
    settled = all(written is not None and now - written > SETTLED for _, _, written in stamps)
    changes = sorted(map(_changed, wanted)) if local else []
    return digest(stamps, changes) if stamps and settled else None


def _changed(info: fs.FileInfo) -> int:
    try:
        return os.stat(info.path).st_ctime_ns
    except FileNotFoundError:  # it has just been taken away
        return 0


def _excluded(one: Listed, patterns: Sequence[str]) -> Listed:
    pattern = next((pattern for pattern in patterns if fnmatchcase(one.adapter_id, pattern)), None)
    return one if pattern is None else one._replace(problem=f"excluded: the config's exclude names {pattern!r}")


def _named(one: Listed) -> Listed:
    """Names are printed on terminals and pages."""
    if not one.adapter_id.isprintable():
        return Listed(one.adapter_id, one.uri, "its name has control characters; rename it")
    if len(one.adapter_id) > MAX_ID:
        short = hashlib.sha256(one.adapter_id.encode()).hexdigest()[:8]  # what the cut leaves may be another's
        return Listed(f"{one.adapter_id[:100]}...{short}", "", f"its name has more than {MAX_ID} characters; rename it")
    return one


def _shown(one: Listed) -> Listed:
    return one if one.problem is None else one._replace(problem=for_display(one.problem, MAX_REASON))


def _from_folder(folder: Folder, infos: Sequence[fs.FileInfo]) -> list[Listed]:
    names = {CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"}
    if folder.is_local:  # full checkpoints of an object store are not fetched
        names |= {"model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"}
    held: dict[str, list[fs.FileInfo]] = {}
    for info in infos:
        held.setdefault(info.path.rpartition("/")[0], []).append(info)
    parents = sorted(parent for parent, files in held.items() if any(info.base_name in names for info in files))
    tails = {one: one.removeprefix(folder.path).strip("/") for one in parents}
    states = {tail: files_state(held[one], folder.is_local) for one, tail in tails.items() if not _is_hidden(tail)}
    root = Path(folder.path).name
    top = Listed("." if root in states else root, folder.uri)  # the pool may itself be an adapter
    listed = {tail: Listed(tail, folder.sub(tail).uri) if tail else top for tail in states}
    found = [one._replace(state=states[tail]) for tail, one in listed.items()]
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


def _from_list(file: Folder) -> tuple[list[Listed], list[Any]]:
    """What a list file names, and the state of it."""
    entries, state = _looked_at(list_entries(file))
    return entries, [file.state(), *state]


def list_entries(file: Folder) -> list[Listed]:
    """The entries of a list file; none of them is looked at.

    Raises:
        InputError: it is malformed, holds credentials or gives one id twice.
    """
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
        return Listed(line, line)  # `_named` says what is wrong
    if "://" in line:
        return Listed(line.removeprefix(HUB), line, _not_remote(line))
    if REVISION.match(line) and not (parent / line).exists():
        return Listed(line, HUB + line)
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
