"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appear_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` to write to; it takes that name at the end, so what has the name is complete.

    What an attempt that was killed has left there is removed; what has failed is not kept.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
