"""Wishes into Ray's resources, for clusters that are not at hand: what a worker would get with GPUs and on many nodes."""

import os
import subprocess
import sys
from typing import Any

import pytest
import ray

from pipeline.cluster.resources import (
    CARRIED,
    Resources,
    describe,
    require,
    torch_env,
    worker_env,
    worker_resources,
    worker_slots,
    workers_at_once,
)
from pipeline.core.errors import InputError


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """nodes({"CPU": 8, "GPU": 4}, ...): a cluster of such nodes."""

    def pretend(*resources: dict[str, float]) -> None:
        total = {name: sum(node.get(name, 0) for node in resources) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in resources])

    return pretend


def test_on_cpus_one_worker_computes_with_all_cores_and_leaves_one_to_ray(nodes: Any) -> None:
    nodes({"CPU": 2})
    assert worker_resources("auto", "auto") == Resources(cpus=1.0, gpus=0, threads=2)
    assert worker_slots(worker_resources("auto", "auto")) == 1


def test_an_engine_on_cpus_takes_a_whole_node(nodes: Any) -> None:
    nodes({"CPU": 8}, {"CPU": 8})
    whole = worker_resources("auto", "auto", spare=0)
    assert whole == Resources(cpus=8, gpus=0, threads=8)
    assert worker_slots(whole, spare=0) == 2


def test_workers_of_other_devices_or_of_more_of_them_are_of_another_kind(nodes: Any) -> None:
    nodes({"CPU": 8, "GPU": 1, "accelerator_type:A100": 1}, {"CPU": 8})
    one, threads = worker_resources("auto", "auto"), worker_resources("auto", 0)
    assert describe(one) == "1 x A100"
    assert describe(one, named=False) == "1 x GPU"
    assert describe(threads, named=False) == describe(threads)
    assert describe(threads).startswith("8 x ")
    kinds = {describe(one), describe(threads), describe(worker_resources("auto", 2)), describe(worker_resources(4, 0))}
    nodes({"CPU": 8, "GPU": 1, "accelerator_type:T4": 1})
    assert len(kinds | {describe(one)}) == 5


def test_on_cpus_workers_share_a_node(nodes: Any) -> None:
    nodes({"CPU": 8})
    shared = worker_resources("auto", "auto", workers=2)
    assert shared == Resources(cpus=3.5, gpus=0, threads=4)
    assert 2 * shared.cpus < 8


def test_where_there_are_gpus_each_worker_takes_one(nodes: Any) -> None:
    nodes({"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}, {"CPU": 8})
    one = worker_resources("auto", "auto")
    assert (one.cpus, one.gpus) == (1.0, 1)
    assert worker_slots(one) == 8
    assert "TORCHDYNAMO_DISABLE" not in worker_env(one)["env_vars"]


def test_tensor_parallel_engines_take_several_gpus_and_run_in_the_actors_process(nodes: Any) -> None:
    nodes({"CPU": 32, "GPU": 8})
    wide = worker_resources("auto", 4)
    assert wide.gpus == 4
    assert worker_slots(wide) == 2
    assert worker_env(wide)["env_vars"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_a_worker_with_a_gpu_computes_with_its_own_nodes_share_of_cpus(nodes: Any) -> None:
    nodes({"CPU": 2}, *[{"CPU": 64, "GPU": 8}] * 4)
    assert worker_resources("auto", "auto").threads == 8
    assert worker_resources("auto", 4).threads == 8  # each of its processes
    nodes({"CPU": 96}, {"CPU": 64, "GPU": 4}, {"CPU": 8, "GPU": 4})
    assert worker_resources("auto", 1).threads == 2


def test_gpus_can_be_left_alone(nodes: Any) -> None:
    nodes({"CPU": 16, "GPU": 2})
    assert worker_resources("auto", 0).gpus == 0


GPU_TASKS = """
import os, ray
from pipeline.cluster.resources import compute_task

def look(gpus):
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
for gpus in (1, 0):
    task = compute_task(look, cpus=1, gpus=gpus)
    print(*(value for _ in range(2) for value in ray.get(task.remote(gpus))), sep=",")
"""


def test_a_task_with_a_gpu_gives_its_memory_back_and_one_without_sees_none() -> None:
    """On a real node that says it has a GPU: what a process holds of it is free when the process has ended."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run([sys.executable, "-c", GPU_TASKS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with_gpu, without = [line.split(",") for line in done.stdout.splitlines()]
    assert with_gpu[0] != with_gpu[2]
    assert (with_gpu[1], with_gpu[3]) == ("0", "0")
    assert without[0] == without[2]
    assert (without[1], without[3]) == ("", "")


def test_what_the_user_asks_for_is_taken(nodes: Any) -> None:
    nodes({"CPU": 16})
    assert worker_resources(4, "auto") == Resources(cpus=4.0, gpus=0, threads=4)
    assert worker_resources(0.5, "auto").threads == 1


@pytest.mark.parametrize(
    ("wish", "count", "message"),
    [
        (Resources(1, 1, 1), 1, "gpus_per_worker: a worker asks for 1 GPU, and the largest node of the cluster has 0"),
        (Resources(9, 0, 9), 1, "cpus_per_worker: a worker asks for 9 CPU, and the largest node of the cluster has 8"),
        (Resources(3, 0, 3), 4, "workers: 4 with 3 CPU and 0 GPU each are to run at once, and the cluster has room for 3"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_by_its_key(nodes: Any, wish: Resources, count: int, message: str) -> None:
    nodes({"CPU": 4}, {"CPU": 8})
    with pytest.raises(InputError, match=f"^train.{message}"):
        require(wish, "train", count)


def test_what_the_cluster_can_hold_is_not_refused(nodes: Any) -> None:
    nodes({"CPU": 4}, {"CPU": 8, "GPU": 2})
    require(Resources(8, 1, 1), "search")
    require(Resources(1, 1, 1), "train", 2)
    nodes({"CPU": 8})
    require(worker_resources("auto", "auto", workers=3), "train", 3)  # 7 / 3 CPUs each
    require(worker_resources("auto", "auto", spare=0), "search")


def test_an_engine_is_called_by_the_keys_of_its_section(nodes: Any) -> None:
    nodes({"CPU": 4})
    with pytest.raises(InputError, match=r"^search.gpus_per_actor: a worker asks for 2 GPU"):
        require(Resources(1, 2, 1), "search")


def test_nodes_that_an_autoscaler_may_bring_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {"ray.io/node-group": "head"}}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    require(Resources(1, 1, 1), "search")
    assert "search.gpus_per_actor: a worker asks for 1 GPU" in caplog.text
    assert "waiting for the autoscaler" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "ahead", "fixed", "growing"), [(40, 16, 3, 16), (2, 16, 2, 2), (40, 8, 3, 8), (40, 2, 3, 3), (0, 16, 0, 0)]
)
def test_workers_are_asked_for_all_at_once_where_an_autoscaler_may_bring_nodes(
    monkeypatch: pytest.MonkeyPatch, wanted: int, ahead: int, fixed: int, growing: int
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 3.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert workers_at_once(Resources(1, 1, 1), wanted, ahead) == fixed
    nodes[1]["Labels"] = {"ray.io/node-group": "gone"}
    assert workers_at_once(Resources(1, 1, 1), wanted, ahead) == fixed
    nodes[0]["Labels"] = {"ray.io/node-group": "gpu"}
    assert workers_at_once(Resources(1, 1, 1), wanted, ahead) == growing


@pytest.mark.parametrize("name", CARRIED)
def test_workers_know_what_the_drivers_environment_says_of_the_network_and_of_vllm(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert worker_env(Resources(1, 0, 2))["env_vars"][name] == "1"
    monkeypatch.delenv(name)
    assert name not in worker_env(Resources(1, 0, 2))["env_vars"]


@pytest.mark.parametrize(("known", "preloaded"), [("libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4:own.so"), (None, None)])
def test_workers_on_cpus_use_the_faster_allocator_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, known: str | None, preloaded: str | None
) -> None:
    monkeypatch.setattr("pipeline.cluster.resources.find_library", lambda name: known)
    monkeypatch.setenv("LD_PRELOAD", "own.so")
    assert worker_env(Resources(1, 0, 2))["env_vars"].get("LD_PRELOAD") == preloaded
    assert "LD_PRELOAD" not in worker_env(Resources(1, 1, 2))["env_vars"]


def test_on_gpus_the_allocator_of_training_grows_its_blocks_and_that_of_engines_does_not() -> None:
    gpu, cpu = Resources(1, gpus=1, threads=4), Resources(1, gpus=0, threads=4)
    growing = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    assert torch_env(gpu)["env_vars"] == worker_env(gpu)["env_vars"] | growing
    assert not growing.keys() & worker_env(gpu)["env_vars"].keys()
    assert torch_env(cpu) == worker_env(cpu)
