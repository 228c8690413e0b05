"""Which files of a target's path hold the rows of a split, and in which form.

A path is a file, or a folder: of files of one form, at any depth; one that `datasets` saved; or a clone of a data set of the Hub,
in which files are of a split by their names, as the Hub has it (`data/train-00000-of-00001.parquet`, `test.jsonl`). A data set
on the Hub is read like its clone; `?split=train_sft` names another of its splits.
"""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs

from pipeline.core.errors import InputError
from pipeline.core.file_names import DATA_SUFFIXES, GZIP_SUFFIX
from pipeline.core.hub import HUB_DATA
from pipeline.core.storage import Folder

Form = Literal["datasets", "parquet", "lines", "csv"]

FORMS: tuple[Form, ...] = ("lines", "lines", "lines", "csv", "csv", "parquet")
"""Of files by the suffixes in DATA_SUFFIXES."""

ABOUT = ("dataset_infos.json", "package.json", "README.json", "_SUCCESS")
"""Files beside the data that tell of it."""

SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\.")
"""Begins the name of a file of the Hub's own writing."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Source:
    """Files of one form; `names` are relative to the folder, which is itself the file where there is an empty one."""

    folder: Folder
    form: Form
    names: list[str]

    def path(self, name: str) -> str:
        return self.folder.sub(name).uri if name else self.folder.uri


def source_of(path: str, role: str) -> Source:
    """The files that hold a split.

    Raises:
        InputError: there are none of a known form, or of several forms.
    """
    folder = Folder.at(path)
    if folder.exists("dataset_dict.json") or folder.exists("dataset_info.json"):
        return Source(folder, "datasets", [""])
    if not folder.is_folder:
        if form := form_of(path):
            return Source(folder, form, [""])
        raise InputError(_unknown(path, role))
    names = _names(folder)
    has_parquet = any(form_of(name) == "parquet" for name in names)
    if form_of(path) == "lines" and not has_parquet:  # as Spark writes, whatever the files are called
        return Source(folder, "lines", names)
    return _in_folder(path, role, folder, names)


def form_of(name: str) -> Form | None:
    """The form of a file by its name."""
    lower = name.lower().removesuffix(GZIP_SUFFIX)
    return next((form for suffix, form in zip(DATA_SUFFIXES, FORMS, strict=True) if lower.endswith(suffix)), None)


def is_packed(name: str) -> bool:
    """Whether a file is compressed by gzip, by its name."""
    return name.lower().endswith(GZIP_SUFFIX)


def split_named(name: str) -> str | None:
    """The split that a file's path names, by its last part that names one."""
    for part in reversed(name.lower().split("/")):
        for split, words in SPLIT_NAMES.items():
            if any(re.search(rf"(^|[^a-z]){word}([^a-z]|$)", part) for word in words):
                return split
    return None


def _in_folder(path: str, role: str, folder: Folder, names: list[str]) -> Source:
    known = [name for name in names if form_of(name) and name.rpartition("/")[2] not in ABOUT]
    if any(name.lower().endswith(".parquet") for name in known):  # a .json may tell of the data
        known = [name for name in known if not name.lower().endswith(".json")]
    known = _asked_for(path, known) or _of_split(path, role, known)
    files: dict[Form, str] = {form: name for name in known if (form := form_of(name))}
    if not files:
        raise InputError(_unknown(path, role))
    if len(files) > 1:
        first, other = sorted(files, key=lambda form: form != "parquet")[:2]
        holds = "Parquet" if first == "parquet" else repr(files[first])
        raise InputError(f"{path}: target.{role} holds {holds} and {files[other]!r}, of another form; give files of one form")
    return Source(folder, next(iter(files)), known)


def _asked_for(path: str, names: list[str]) -> list[str]:
    """The files of the split that the path of a data set of the Hub asks for; none: it asks for none.

    Raises:
        InputError: there is none of that name.
    """
    split = parse_qs(path.partition("?")[2]).get("split", [""])[-1].lower() if path.startswith(HUB_DATA) else ""
    found = [name for name in names if split and re.search(rf"(^|[^a-z0-9]){re.escape(split)}([^a-z0-9]|$)", name.lower())]
    if split and not found:
        raise InputError(f"{path}: no file of the split {split!r}; there are {', '.join(names[:5])}")
    return found


def _of_split(path: str, role: str, names: list[str]) -> list[str]:
    """The files of a split, where their names say of which they are; those that name none may be of train."""
    splits = {name: split_named(name) for name in names}
    there = sorted({split for split in splits.values() if split})
    if not there:
        return names
    mine = [name for name in names if splits[name] == role]
    if not mine and role == "train":
        mine = [name for name in names if splits[name] is None]
    if not mine:
        has = f"its files are of {', '.join(there)}"
        raise InputError(f"{path}: no split {role!r} in this folder ({has}); name a file (target.{role})")
    kinds = sorted({match["split"] for name in mine if (match := SHARD.match(name.rpartition("/")[2]))})
    if len(kinds) > 1:
        way_out = f"on the Hub ?split={kinds[0]} names one; else give a file, or a folder with the files of one"
        raise InputError(f"{path}: its files for target.{role} are of the splits {', '.join(kinds)}; {way_out}")
    return mine


def _names(folder: Folder) -> list[str]:
    """Of the files in a folder, but for hidden ones."""
    names = sorted(info.path.removeprefix(f"{folder.path}/") for info in folder.walk())
    return [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]


def _unknown(path: str, role: str) -> str:
    return (
        f"{path}: target.{role} must be .jsonl, .json, .csv or .parquet, text also packed by gzip, a folder of such files, or a "
        "folder saved by datasets"
    )
