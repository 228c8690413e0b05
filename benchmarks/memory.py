"""The most memory that a benchmark's own process, its Ray workers and its object store held."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import node_stats

LOOKS = 0.1
"""Seconds between two looks at the memory of all processes."""


def own_peak() -> float:
    """The most memory of this process so far, in megabytes. What `resource` says may be that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


class Peaks:
    """While it is entered: the most memory of a Ray worker of this process, apart from shared memory and mapped files, and of its
    object store, in megabytes."""

    def __init__(self) -> None:
        self.worker = self.object_store = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        node = ray.nodes()[0]
        while not self._over.wait(LOOKS):
            store = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            self.object_store = max(self.object_store, store.object_store_bytes_used / 2**20)
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    self._look(process)

    def _look(self, process: psutil.Process) -> None:
        if "ray::" in " ".join(process.cmdline()):
            memory = process.memory_info()
            self.worker = max(self.worker, (memory.rss - memory.shared) / 2**20)


class EnginePeaks:
    """The most memory of a search's engines and of its dispatcher, in megabytes, apart from shared memory, as `look` sees it."""

    def __init__(self) -> None:
        self._peaks = {"engine": 0.0, "dispatcher": 0.0}

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                kind = "engine" if "MapWorker" in title else "dispatcher" if "Dispatcher" in title else None
                if kind:
                    memory = process.memory_info()
                    self._peaks[kind] = max(self._peaks[kind], (memory.rss - memory.shared) / 1e6)

    def found(self) -> dict[str, int]:
        return {f"{kind}_mb": round(peak) for kind, peak in self._peaks.items()}
