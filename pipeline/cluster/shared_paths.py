"""Whether all nodes of a cluster see the local paths of a run. Adapters of a folder that a node lacks would be set aside as
missing, and scores and rows that it wrote would lie on its own disk."""

import uuid
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.errors import InputError
from pipeline.core.hub import HUB
from pipeline.core.storage import Folder

PATIENCE = 60.0
"""Seconds that nodes may take to answer. Of one that does not nothing is known."""


class SharedPaths:
    """Those of some locations that are local, by the config's keys that name them."""

    def __init__(self, read: Mapping[str, str | None], written: Mapping[str, str | None]) -> None:
        """
        Args:
            written: folders in which all nodes must see what one of them wrote; of `read` each may have its own copy.
        """
        self._read = {key: folder.path for key, folder in _local(read).items() if Path(folder.path).exists()}
        self._written = _local(written)
        self._asked: set[str] = set()

    def check(self) -> None:
        """Ask the nodes that have joined since the last call.

        Raises:
            InputError: one does not see a path.
        """
        new = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        for known in (*self._asked, ray.get_runtime_context().get_node_id()):
            new.pop(known, None)
        if not new or not (self._read or self._written):
            return
        self._asked |= new.keys()
        token = f".seen-{uuid.uuid4().hex}"
        try:
            for folder in self._written.values():
                folder.write_text(token, "")
            unseen = _ask(list(new), self._read | {key: folder.join(token) for key, folder in self._written.items()})
        finally:
            for folder in self._written.values():
                folder.delete(token)
        paths = self._read | {key: folder.path for key, folder in self._written.items()}
        for key, nodes in unseen.items():
            addresses = ", ".join(sorted({new[node] for node in nodes}))
            raise InputError(
                f"{paths[key]} ({key}): not seen from {addresses}; give a folder that all nodes share, or one of an object store"
            )


def _ask(nodes: list[str], paths: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys of paths that some of the nodes do not see, and which."""
    look = ray.remote(num_cpus=0, max_retries=0)(_missing)
    on = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    tasks = {look.options(scheduling_strategy=on[node]).remote(paths): node for node in nodes}
    answered, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=PATIENCE)
    unseen: dict[str, list[str]] = {}
    for task in answered:
        try:
            missing = ray.get(task)
        except RayError:  # the node has gone again
            continue
        for key in missing:
            unseen.setdefault(key, []).append(tasks[task])
    return unseen


def _local(locations: Mapping[str, str | None]) -> dict[str, Folder]:
    folders = {key: Folder.at(location) for key, location in locations.items() if location and not location.startswith(HUB)}
    return {key: folder for key, folder in folders.items() if folder.is_local}


def _missing(paths: Mapping[str, str]) -> list[str]:
    return [key for key, path in paths.items() if not Path(path).exists()]
