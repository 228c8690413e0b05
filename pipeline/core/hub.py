"""The Hugging Face Hub: how places there are written, which of its errors are transient, and requests that are made again."""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar
from urllib.parse import quote, unquote

from pipeline.core.file_names import DATA_SUFFIXES, GZIP_SUFFIX

T = TypeVar("T")

PAUSES = (1, 2, 4, 8, 16, 32)
"""Seconds between two requests, beside those that the Hub's own library leaves."""

BUSY = (408, 429)
"""HTTP statuses, beside those of 500 and above."""

NO_ADDRESS = {"UnsupportedProtocol", "LocalProtocolError"}
"""Of the HTTP client's errors those of an endpoint that can never be reached."""

XET = ("CAS Client Error", "error sending request")
"""In what the client of the Hub's storage for large files raises, a plain RuntimeError, where that cannot be reached."""


HUB, HUB_DATA = "hf://", "hf://datasets/"
COMMIT = re.compile("[0-9a-f]{40}")
PLACE = re.compile(r"(?P<repo>[^/@?]+/[^/@?]+)(@(?P<revision>[^/?]+))?(/(?P<folder>[^?]*))?")
DATA_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@[^/?\s]+)?(\?split=[^?]*)?", re.ASCII)
"""`ORG/NAME[@REVISION][?split=NAME]`."""


class Place(NamedTuple):
    """A folder of a model's repository, `hf://ORG/NAME[@REVISION][/FOLDER]`. In a revision %2F stands for a slash."""

    repo: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def of(cls, uri: str) -> "Place | None":
        """None: it names none."""
        found = PLACE.fullmatch(uri.removeprefix(HUB).rstrip("/"))
        if not found:
            return None
        revision = found["revision"] and unquote(found["revision"])
        return cls(found["repo"], revision, found["folder"] or "")

    @property
    def uri(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{HUB}{self.repo}{revision}" + (f"/{self.folder}" if self.folder else "")

    @property
    def is_pinned(self) -> bool:
        """Whether its revision is a commit, whose files never change."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))

    def file(self, name: str) -> str:
        """The path of one of its files in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def data_place(path: str) -> str:
    """A target's path; the bare id of a data set of the Hub, `ORG/NAME[@REVISION][?split=NAME]`, behind hf://datasets/. What is
    there on this machine under that name is meant before that, and so is what is called as a file of data."""
    found = DATA_ID.fullmatch(path)
    if not found or os.path.lexists(path) or found["name"].lower().removesuffix(GZIP_SUFFIX).endswith(DATA_SUFFIXES):
        return path
    return HUB_DATA + path


class HubBusyError(OSError):
    """The Hub does not answer, or limits the rate of requests. It may answer later."""


def from_hub(ask: Callable[[], T]) -> T:
    """What a request of the Hub gives, which is made again for a minute where it may pass what is in the way.

    Raises:
        HubBusyError: the Hub does not answer.
        Exception: as `ask`, where the Hub has answered, or is not to be asked.
    """
    for pause in (*PAUSES, None):
        try:
            return ask()
        except Exception as error:  # of whatever kind: transformers and the Hub's library wrap what others raise
            if not is_busy(error):
                raise
            if pause is None:
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                way_out = "the same command goes on later; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
                raise HubBusyError(f"the Hub does not answer, or limits requests ({reason[0]}); {way_out}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_busy(error: BaseException) -> bool:
    """Whether an error came of a Hub that cannot be reached, fails or limits requests: by the names that the Hub's library and
    its HTTP client have for such errors, under whatever others they lie."""
    for one in _causes(error):
        names = {kind.__name__ for kind in type(one).__mro__}
        if "OfflineModeIsEnabled" in names:
            return False
        status = getattr(getattr(one, "response", None), "status_code", 0)
        unreached = "TransportError" in names and not names & NO_ADDRESS
        if unreached or status in BUSY or status >= 500 or (type(one) is RuntimeError and any(mark in str(one) for mark in XET)):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
