"""A trace of a few training steps, for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.profiler import profile, schedule

from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder

WARM, STEPS = 1, 3
"""Steps before those that are traced, and those."""


@contextmanager
def traced(name: str, folder: Folder | None) -> Iterator[Callable[[], None]]:
    """Trace the first steps into a file in `folder`; None: do not. Yields what is to be called after each step."""
    if folder is None:
        yield lambda: None
        return
    with profile(
        schedule=schedule(wait=0, warmup=WARM, active=STEPS, repeat=1),
        on_trace_ready=partial(_store, name, folder),
        record_shapes=True,
    ) as profiler:
        yield profiler.step


def _store(name: str, folder: Folder, profiler: profile) -> None:
    with temporary_folder() as scratch:
        profiler.export_chrome_trace(str(scratch / name))
        folder.copy_file(name, Folder.at(str(scratch)))
