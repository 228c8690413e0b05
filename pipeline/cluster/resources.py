"""Wishes for workers as Ray's resource arguments and environments, and whether the cluster can hold them."""

import logging
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from pipeline.core.errors import InputError

NODE_GROUP = "ray.io/node-group"
"""Ray's label for nodes that an autoscaler may start more of; it does not say which kinds it has that are not up."""

MOST_AHEAD = 16
"""Workers that an autoscaler is asked for at once where the config does not say how many; more come as these are busy. Each arm
that waits for its nodes holds some hundred MB of the head's memory."""

CARRIED = ("HF_HUB_OFFLINE", "HF_HOME", "VLLM_BATCH_INVARIANT", "VLLM_USE_V2_MODEL_RUNNER")
"""Settings of the driver's environment that hold for its workers, too: no network; scores that do not depend on the batch, bit by
bit, for some speed; vLLM's older model runner."""

WORKER = {"search": "actor", "train": "worker"}
"""What the config's keys call a worker, by section."""


@dataclass(frozen=True)
class Resources:
    """What one worker process gets; `threads` is its number of compute threads."""

    cpus: float
    gpus: int
    threads: int


def worker_resources(cpus: float | str, gpus: int | str, workers: int = 1, spare: int = 1) -> Resources:
    """Resolve 'auto' against the cluster, for `workers` that run at once.

    A worker takes a GPU where there is one, and computes with the share of its node's CPUs that falls to one GPU: the least one,
    where nodes differ. On CPUs the workers share out a node's CPUs less `spare`, which stay free for Ray Data's reading and
    writing, and compute with as many threads together as the node has cores.
    """
    total = ray.cluster_resources()
    n_gpus = (1 if total.get("GPU", 0) else 0) if gpus == "auto" else int(gpus)
    node_cpus = int(max((node.get("CPU", 1) for node in live_nodes()), default=1))
    if cpus != "auto":
        return Resources(float(cpus), n_gpus, max(1, int(cpus)))
    if n_gpus:
        shares = [int(node.get("CPU", 1) // node["GPU"]) for node in live_nodes() if node.get("GPU", 0) >= 1]
        return Resources(1.0, n_gpus, max(1, min(shares, default=node_cpus)))
    nodes = max(1, int(total.get("CPU", 1)) // node_cpus)
    here = -(-workers // nodes)
    return Resources(max(1, node_cpus - spare) / here, 0, max(1, node_cpus // here))


def worker_slots(resources: Resources, spare: int = 1) -> int:
    """How many workers of this kind the cluster holds at once; `spare` CPUs of each node stay free for Ray Data."""
    slots = 0
    for node in live_nodes():
        by_cpu = int((node.get("CPU", 0) - spare) / resources.cpus)
        slots += min(by_cpu, int(node.get("GPU", 0) // resources.gpus)) if resources.gpus else by_cpu
    return max(1, slots)


def workers_at_once(resources: Resources, wanted: int, ahead: int = MOST_AHEAD, spare: int = 1) -> int:
    """How many of `wanted` workers of this kind to ask for at once: as many as the nodes hold that are up, or `ahead` of them
    where an autoscaler may bring further nodes. `spare` as of `worker_slots`."""
    slots = worker_slots(resources, spare)
    return min(wanted, max(slots, ahead) if may_grow() else slots)


def may_grow() -> bool:
    """Whether an autoscaler may bring nodes; it does not say which, or how many."""
    return any(NODE_GROUP in node.get("Labels", {}) for node in ray.nodes() if node["Alive"])


def live_nodes() -> list[dict[str, float]]:
    """The resources of each node that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def share_of_node(cpus: float | None = None) -> tuple[float, float]:
    """The share of this node that this worker was given, by GPUs or where it has none by CPUs, and the node's memory in bytes as
    Ray counts it. For a Ray worker.

    Args:
        cpus: those that it computes with, where Ray was told of others.
    """
    here = ray.get_runtime_context()
    [node] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here.get_node_id()]
    mine = here.get_assigned_resources() if cpus is None else {"CPU": cpus}
    kind = "GPU" if mine.get("GPU") else "CPU"
    return mine.get(kind, 0.0) / node.get(kind, 1.0), node.get("memory", 0.0)


def describe(resources: Resources, named: bool = True) -> str:
    """What computes in a worker of this kind, so that speeds measured on one kind are not taken for those of another: GPUs by
    the names that Ray has for them, CPUs by this machine's model.

    Args:
        named: else GPUs are counted alone, as where no node has one yet.
    """
    if not resources.gpus:
        return f"{resources.threads} x {_cpu_model()}"
    mark = "accelerator_type:"
    models = sorted({name.removeprefix(mark) for node in live_nodes() for name in node if name.startswith(mark)})
    return f"{resources.gpus} x {(named and ' or '.join(models)) or 'GPU'}"


def require(resources: Resources, section: Literal["search", "train"], count: int = 1) -> None:
    """See to it that the cluster holds `count` such workers at once. Where an autoscaler may bring the nodes for it, it is said
    that they are waited for.

    Args:
        section: the part of the config that asks for them.

    Raises:
        InputError: it cannot; Ray would wait for ever.
    """
    nodes = live_nodes()
    room = sum(_room(node, resources) for node in nodes)
    if room >= count:
        return
    missing = _missing(resources, section, count, room, nodes)
    if not may_grow():
        raise InputError(f"{missing}; ask for less, or add nodes to the cluster")
    logging.getLogger(__name__).warning("%s; waiting for the autoscaler to bring more", missing)


def compute_task(
    function: Callable[..., Any], cpus: float | str = "auto", gpus: int | str = "auto", on_held_cpus: bool = False
) -> Any:
    """`function` as a Ray task with the resources and the environment of one compute worker. Where it gets a GPU, its process
    ends with it: idle, that would hold the card's memory, which the next engine wants.

    Args:
        on_held_cpus: workers of ours that are idle hold the CPUs, and Ray has none to give.
    """
    resources = worker_resources(cpus, gpus)
    given = 0 if on_held_cpus else resources.cpus
    # Not by `.options()`: Ray ends a task's process only where the decorator asks for the GPU.
    return ray.remote(num_cpus=given, num_gpus=resources.gpus, runtime_env=torch_env(resources))(function)


def worker_env(resources: Resources) -> dict[str, Any]:
    """The runtime environment of a compute worker: its threads and allocator, and vLLM inside the worker's own process."""
    return {
        "env_vars": {
            **({} if resources.gpus else _cpu_env()),
            "OMP_NUM_THREADS": str(resources.threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of the machine's memory
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
            **{name: os.environ[name] for name in CARRIED if name in os.environ},
        }
    }


def torch_env(resources: Resources) -> dict[str, Any]:
    """The runtime environment of a worker that computes with torch alone: on GPUs its allocator grows the blocks that it has, as
    passes of many widths would leave memory in pieces that fit none of them. Not for vLLM, some of whose parts refuse it."""
    env, growing = worker_env(resources), "expandable_segments:True"
    if resources.gpus:
        # torch 2.9 and later read the first, and what looks for the setting elsewhere, as Ray and vLLM do, the second.
        env["env_vars"] |= {"PYTORCH_ALLOC_CONF": growing, "PYTORCH_CUDA_ALLOC_CONF": growing}
    return env


def _room(node: dict[str, float], resources: Resources) -> int:
    """How many such workers a node with these resources holds."""
    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items() if amount)


def _missing(resources: Resources, section: str, count: int, room: int, nodes: list[dict[str, float]]) -> str:
    """What of a wish the cluster lacks, by the config's key."""
    for name, key, asked in (("CPU", "cpus", resources.cpus), ("GPU", "gpus", resources.gpus)):
        most = max((node.get(name, 0) for node in nodes), default=0)
        if asked > most:
            wish = f"{section}.{key}_per_{WORKER[section]}: a worker asks for {asked:g} {name}"
            return f"{wish}, and the largest node of the cluster has {most:g}"
    wish = f"{section}.{WORKER[section]}s: {count} with {resources.cpus:g} CPU and {resources.gpus} GPU each are to run at once"
    return f"{wish}, and the cluster has room for {room}"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_env() -> dict[str, str]:
    # vLLM compiles at the first batch: measured, that one took 68 s instead of 23 s, and later ones gained nothing.
    # Ray leaves all GPUs of a node visible to whoever asked for none.
    # Threads that spin while they wait take the CPUs from whatever else works there.
    env = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    # By its name alone, so that a node which has it elsewhere finds it and one which has it not goes on without.
    if tcmalloc := find_library("tcmalloc_minimal") or find_library("tcmalloc"):
        env["LD_PRELOAD"] = ":".join(filter(None, (tcmalloc, os.environ.get("LD_PRELOAD"))))
    return env
