"""Pools on the Hugging Face Hub.

    hf://?base=ORG/NAME&limit=500       adapters of a base, as their cards name it, the most downloaded first
    hf://ORG/NAME[@REVISION][/FOLDER]   the adapters in a repository

`base` may be given several times, as adapters are also trained on quantised copies of a base; `author`: those of one owner.
Each adapter is pinned to the commit that there is now: whoever fetches it later gets what was checked.
"""

from functools import partial
from typing import NamedTuple
from urllib.parse import parse_qs

from huggingface_hub import HfApi

from pipeline.core.errors import InputError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.hub import HUB, Place
from pipeline.core.hub_api import answer

FORM = "a pool on the Hub is hf://?base=ORG/NAME (with &limit=500, &author=ORG) or hf://ORG/NAME[@REVISION][/FOLDER]"
OPTIONS = {"base", "limit", "author"}


class OnHub(NamedTuple):
    """An adapter on the Hub; `downloads`: of its repository in the last month."""

    place: Place
    downloads: int | None

    @property
    def adapter_id(self) -> str:
        return self.place._replace(revision=None).uri.removeprefix(HUB)


def adapters_on_hub(pool: str) -> list[OnHub]:
    """What a pool on the Hub holds.

    Raises:
        InputError: the pool is not written as FORM says, or the Hub refuses it.
        HubBusyError: the Hub does not answer.
    """
    options, place = parse_qs(pool.partition("?")[2], keep_blank_values=True), Place.of(pool)
    if place:
        return answer(pool, partial(_of_repository, place))
    limit = options.get("limit", ["1"])[-1]
    bases = options.get("base", [])
    right = pool.startswith(f"{HUB}?") and bases and all(base.count("/") == 1 for base in bases) and options.keys() <= OPTIONS
    if not (right and limit.isdecimal() and int(limit)):
        raise InputError(f"{pool}: {FORM}")
    most = int(limit) if "limit" in options else None
    author = options.get("author", [None])[-1]
    found = [one for base in bases for one in answer(pool, partial(_of_base, base, author, most))]
    ranked = sorted({one.place.repo: one for one in found}.values(), key=lambda one: (-(one.downloads or 0), one.adapter_id))
    return ranked[:most]


def _of_base(base: str, author: str | None, most: int | None, api: HfApi) -> list[OnHub]:
    said = api.list_models(
        filter=f"base_model:adapter:{base}", author=author, sort="downloads", limit=most, expand=["sha", "downloads"]
    )
    return [OnHub(Place(model.id, model.sha), model.downloads) for model in said]


def _of_repository(place: Place, api: HfApi) -> list[OnHub]:
    said = api.model_info(place.repo, revision=place.revision)
    files = (file.rfilename.rpartition("/") for file in said.siblings or [])
    folders = sorted({folder for folder, _, name in files if name in (CONFIG_FILE, WEIGHTS_FILE)})
    inside = [one for one in folders if not place.folder or f"{one}/".startswith(f"{place.folder}/")]
    return [OnHub(Place(place.repo, said.sha, folder), said.downloads) for folder in inside]
