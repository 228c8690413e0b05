"""Bring an adapter's files onto this machine: from a local folder, the Hub or an object store."""

import glob
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pipeline.core.errors import AdapterError, InputError, first_line, is_transient
from pipeline.core.file_names import FILES
from pipeline.core.hub import HUB, HubBusyError, Place, from_hub
from pipeline.core.storage import Folder

MAX_ADAPTER_BYTES = 8 << 30
"""Of one that is fetched: rank 64 on all linear layers of a model of 70 billion weights takes 3.3 GB."""


class FetchError(AdapterError):
    """An adapter cannot be brought here: it says something of the way to it, which may be another one tomorrow, and nothing of
    the adapter."""


def locate(uri: str, max_bytes: int = MAX_ADAPTER_BYTES) -> Path | Folder:
    """Where an adapter is: a local folder, used in place, or a folder of an object store. Hub files go to the Hub's own cache,
    which serves them again without a network.

    Raises:
        FetchError: the Hub or the store cannot be reached.
        AdapterError: the Hub has more than `max_bytes` of it.
    """
    if "://" not in uri:
        return Path(uri)
    if uri.startswith(HUB):
        return _from_hub(uri, max_bytes)
    try:
        folder = Folder.at(uri)
    except InputError as error:
        raise unfetched(uri, error) from error
    return Path(folder.path) if folder.is_local else folder


def fetch_adapter(uri: str, cache: Path) -> Path:
    """The local folder of one adapter; object-store files are copied under `cache`. For many, see `pipeline.adapters.cache`.

    Raises:
        FetchError: it cannot be reached.
        OSError: not now, but perhaps later; see `errors.is_transient`.
    """
    place = locate(uri)
    if isinstance(place, Path):
        return place
    target = cache / hashlib.sha256(uri.encode()).hexdigest()[:32]
    try:
        place.download(FILES, target)
    except OSError as error:
        raise unfetched(uri, error) from error
    return target


def unfetched(uri: str, error: Exception) -> Exception:
    """What to raise of an adapter that an error keeps from coming here; one that may pass is raised as it is."""
    return error if is_transient(error) else FetchError(f"cannot be fetched from {uri} ({error})")


def require_size(where: str, size: int, max_bytes: int) -> None:
    """Refuse an adapter before it is fetched.

    Raises:
        AdapterError: it has more than `max_bytes`.
    """
    if size > max_bytes:
        raise AdapterError(f"cannot be fetched from {where} (it has {size} bytes; {max_bytes} are allowed)")


def _from_hub(uri: str, max_bytes: int) -> Path:
    place = Place.of(uri)
    if place is None:
        raise FetchError(f"cannot be fetched from the Hub: {uri} is not hf://ORG/NAME[@REVISION][/FOLDER]")
    try:
        return from_hub(partial(_ask_hub, place, max_bytes))
    except HubBusyError:
        raise
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
        raise FetchError(f"cannot be fetched from the Hub and is not in its cache ({first_line(why)})") from error


def _ask_hub(place: Place, max_bytes: int) -> Path:
    asked: dict[str, Any] = {"revision": place.revision, "allow_patterns": [glob.escape(place.file(name)) for name in FILES]}
    try:
        files = snapshot_download(place.repo, dry_run=True, **asked)
    except DryRunError as error:  # where the Hub cannot be asked, its cache may have the adapter
        try:
            return Path(snapshot_download(place.repo, local_files_only=True, **asked)) / place.folder
        except LocalEntryNotFoundError:
            raise error from error.__cause__
    require_size("the Hub", sum(file.file_size or 0 for file in files), max_bytes)
    return Path(snapshot_download(place.repo, **asked)) / place.folder
