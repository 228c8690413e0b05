"""The one place where a run meets the Ray cluster: connecting, and turning wishes into Ray's resource arguments."""

import logging
import os
import time
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import DataContext

START_ATTEMPTS = 3
"""To start Ray on this machine."""


@dataclass(frozen=True)
class Resources:
    """What one worker process gets; `threads` is its number of compute threads."""

    cpus: float
    gpus: int
    threads: int


def connect() -> float:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; with a cluster at hand, do nothing.

    Returns:
        Seconds that it took.
    """
    started = time.perf_counter()
    if not ray.is_initialized():
        _quiet()
        _join_or_start()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return time.perf_counter() - started


def worker_resources(cpus: float | str, gpus: int | str, workers: int = 1, spare: int = 1) -> Resources:
    """Resolve 'auto' against the cluster, for `workers` that run at once.

    A worker takes a GPU where there is one. On CPUs the workers share out a node's CPUs less `spare`, which stay free for Ray
    Data's reading and writing, and compute with as many threads together as the node has cores.
    """
    total = ray.cluster_resources()
    n_gpus = (1 if total.get("GPU", 0) else 0) if gpus == "auto" else int(gpus)
    node_cpus = int(max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1))
    if cpus != "auto":
        return Resources(float(cpus), n_gpus, max(1, int(cpus)))
    if n_gpus:
        return Resources(1.0, n_gpus, max(1, node_cpus // max(1, int(total.get("GPU", 1)))))
    nodes = max(1, int(total.get("CPU", 1)) // node_cpus)
    here = -(-workers // nodes)
    return Resources(max(1, node_cpus - spare) / here, 0, max(1, node_cpus // here))


def engine_slots(resources: Resources) -> int:
    """How many workers of this kind the cluster holds at once; one CPU of each node stays free for Ray Data."""
    slots = 0
    for node in (node["Resources"] for node in ray.nodes() if node["Alive"]):
        by_cpu = int((node.get("CPU", 0) - 1) / resources.cpus)
        slots += min(by_cpu, int(node.get("GPU", 0) // resources.gpus)) if resources.gpus else by_cpu
    return max(1, slots)


def compute_task(function: Callable[..., Any], cpus: float | str = "auto", gpus: int | str = "auto") -> Any:
    """`function` as a Ray task with the resources and the environment of one compute worker."""
    resources = worker_resources(cpus, gpus)
    return ray.remote(function).options(num_cpus=resources.cpus, num_gpus=resources.gpus, runtime_env=worker_env(resources))


def worker_env(resources: Resources) -> dict[str, Any]:
    """The runtime environment of a compute worker: its threads and allocator, and vLLM inside the worker's own process."""
    return {
        "env_vars": {
            **({} if resources.gpus else _cpu_env()),
            "OMP_NUM_THREADS": str(resources.threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if resources.gpus > 1 else "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of the machine's memory
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Where a network is not to be used, workers must know it too.
            **{name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ},
        }
    }


def _join_or_start() -> None:
    """A start is tried again: on a busy machine some of Ray's processes may come too late for the others, which then give up."""
    address, attempts = (None, 1) if os.environ.get("RAY_ADDRESS") else ("local", START_ATTEMPTS)
    for attempt in range(attempts):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except Exception:  # Ray raises no narrower one
            ray.shutdown()
            if attempt + 1 == attempts:
                raise


def _cpu_env() -> dict[str, str]:
    # vLLM compiles at the first batch: measured, that one took 68 s instead of 23 s, and later ones gained nothing.
    env = {"TORCHDYNAMO_DISABLE": "1"}
    # By its name alone, so that a node which has it elsewhere finds it and one which has it not goes on without.
    if tcmalloc := find_library("tcmalloc_minimal") or find_library("tcmalloc"):
        env["LD_PRELOAD"] = ":".join(filter(None, (tcmalloc, os.environ.get("LD_PRELOAD"))))
    return env


def _quiet() -> None:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    for name in ("ray", "ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and said once
