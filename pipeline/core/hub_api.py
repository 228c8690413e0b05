"""Requests of the Hugging Face Hub that are made for something that a user named."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pipeline.core.errors import InputError, first_line
from pipeline.core.hub import HUB, HUB_DATA, Place, from_hub

T = TypeVar("T")


def answer(name: str, ask: Callable[[HfApi], T], may: str = "read it") -> T:
    """What the Hub says to a request about `name`.

    Args:
        may: what HF_TOKEN must allow.

    Raises:
        InputError: the Hub refuses it, or is not to be asked.
        HubBusyError: the Hub does not answer.
    """
    api = HfApi()
    try:
        return from_hub(lambda: ask(api))
    except OfflineModeIsEnabled as error:
        raise InputError(f"{name}: the Hub is not asked, as HF_HUB_OFFLINE is set; unset it") from error
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        why = f"the Hub says no ({first_line(error)})"
        raise InputError(f"{name}: {why}; is the name right, and HF_TOKEN one that may {may}?") from error


def commit_of(repo: str, revision: str | None, file: str) -> str:
    """What a revision of a model's repository means today, by one of its files. The Hub's cache, which is asked where there is
    no network, has the file in a folder that is called by the commit.

    Raises:
        HubBusyError: the Hub does not answer.
        OSError, ValueError: as `hf_hub_download`, where it says no.
    """
    return Path(from_hub(lambda: hf_hub_download(repo, file, revision=revision)).removesuffix(file)).name


def pinned_data(path: str) -> str:
    """A target's path, with the commit that there is now where it is of the Hub: all who read it then read the same.

    Raises:
        InputError, HubBusyError: as `answer`; or it is not written as hf://datasets/ORG/NAME[@REVISION][/FOLDER].
    """
    if not path.startswith(HUB_DATA):
        return path
    start, mark, options = path.partition("?")
    place = Place.of(HUB + start.removeprefix(HUB_DATA))
    if place is None:
        raise InputError(f"{path}: a data set of the Hub is hf://datasets/ORG/NAME[@REVISION][/FOLDER][?split=NAME]")
    repo, revision = place.repo, place.revision
    if not place.is_pinned:
        name = path if place.folder else f"{path} (nor is {path.removeprefix(HUB_DATA)} there on this machine)"
        revision = answer(name, lambda api: api.dataset_info(repo, revision=revision)).sha
    return HUB_DATA + place._replace(revision=revision).uri.removeprefix(HUB) + mark + options
