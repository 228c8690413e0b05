"""What a base model is called, and which of its versions is meant: `name`, or `name@version` where that is pinned.

a local folder                      itself
org/name, org/name@revision         on the Hub; a run pins the commit
s3://bucket/base                    a folder of an object store; a run pins the state of its files
"""

import re
from pathlib import Path

from pipeline.core.errors import InputError, unknown_base
from pipeline.core.hub import COMMIT, HubBusyError
from pipeline.core.hub_api import commit_of
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder

STATE = re.compile("state-[0-9a-f]{16}")


def is_stored(base: str) -> bool:
    """Whether it is in an object store."""
    return "://" in base


def split(base: str) -> tuple[str, str | None]:
    """Name and version; None: whichever there is."""
    name, _, version = base.rpartition("@")
    if not name or Path(base).is_dir() or (is_stored(base) and not STATE.fullmatch(version)):
        return base, None
    return name, version


def name_of(base: str) -> str:
    return split(base)[0]


def pinned(base: str) -> str:
    """The base with the version that there is now, so that all who load it load the same.

    Raises:
        InputError: there is no such base.
        OSError: the Hub or the store does not answer; see `errors.is_transient`.
    """
    name, version = split(base)
    if is_stored(base):
        return base if version else f"{name}@{state_of(name)}"
    if looks_local(name) or Path(base).is_dir() or (version and COMMIT.fullmatch(version)):
        return base
    try:
        return f"{name}@{commit_of(name, version, 'config.json')}"
    except HubBusyError:
        raise
    except (OSError, ValueError) as error:
        raise unknown_base(base, error) from error


def looks_local(base: str) -> bool:
    return base.startswith((".", "/", "~")) or (base.count("/") > 1 and not is_stored(base))


def state_of(name: str) -> str:
    """What differs once a file of a base in an object store has changed.

    Raises:
        InputError: there is nothing.
    """
    files = Folder.at(name).state()
    if not files:
        raise InputError(f"{name}: nothing is there; a base model is a folder with config.json, a tokenizer and *.safetensors")
    return f"state-{digest(files)[:16]}"
