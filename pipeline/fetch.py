"""Bring an adapter's files onto this machine: from a local folder, the Hub or an object store."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pipeline.errors import AdapterError, InputError
from pipeline.merge.adapter import FILES
from pipeline.storage import Folder

HUB = "hf://"


def locate(uri: str) -> Path | Folder:
    """Where an adapter is: a local folder, used in place, or a folder of an object store. Hub files go to the Hub's own cache,
    which serves them again without a network.

    Raises:
        AdapterError: the Hub or the store cannot be reached.
    """
    if "://" not in uri:
        return Path(uri)
    if uri.startswith(HUB):
        return _from_hub(uri.removeprefix(HUB))
    try:
        folder = Folder.at(uri)
    except InputError as error:
        raise AdapterError(f"cannot be fetched from {uri} ({error})") from error
    return Path(folder.path) if folder.is_local else folder


def fetch_adapter(uri: str, cache: Path) -> Path:
    """The local folder of one adapter; object-store files are copied under `cache`. For many, see `pipeline.cache`.

    Raises:
        AdapterError: it cannot be reached.
    """
    place = locate(uri)
    if isinstance(place, Path):
        return place
    target = cache / hashlib.sha256(uri.encode()).hexdigest()[:32]
    try:
        place.download(FILES, target)
    except OSError as error:
        raise AdapterError(f"cannot be fetched from {uri} ({error})") from error
    return target


def _from_hub(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(f"cannot be fetched from the Hub and is not in its cache ({reason})") from error
