"""The fast engine with tensor parallelism: two worker processes, here on CPUs, that an adapter's NaN does not spoil and that end
with the engine."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.engines.transformers import TransformersScorer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install '.[cpu]'"),
    pytest.mark.xdist_group("vllm-parallel"),  # one engine for all
]


def is_alive(process: int) -> bool:
    """A zombie, which nobody has taken notice of, is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(processes: list[int], seconds: float) -> bool:
    """Whether they do within so many seconds."""
    until = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(is_alive, processes))


@pytest.fixture(scope="module")
def actor(ray_session: None, engine_config: EngineConfig) -> Iterator[Any]:
    import ray

    from pipeline.cluster.resources import Resources, worker_env
    from pipeline.engines.scorer import build_scorer

    class Engine:
        def __init__(self, config: EngineConfig):
            self.scorer: Any = build_scorer("vllm", config)

        def score(self, candidates: list[Candidate], samples: pa.Table) -> pa.Table:
            return self.scorer.score(candidates, samples)

        def processes(self) -> list[int]:
            """The engine's own, and those of vLLM's workers."""
            return [os.getpid(), *self.scorer.llm.collective_rpc(lambda worker: os.getpid())]

        def hang(self) -> None:
            self.scorer.llm.collective_rpc(lambda worker: time.sleep(1000))

    environment = worker_env(Resources(cpus=1, gpus=2, threads=1))
    environment["env_vars"] |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    config = replace(engine_config, tensor_parallel_size=2)
    actor = ray.remote(Engine).options(num_cpus=1, runtime_env=environment).remote(config)
    yield actor
    ray.kill(actor)


def test_an_adapter_that_blows_up_bends_no_other_score(
    actor: Any,
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    import ray

    wild = Candidate("wild", make_adapter(tmp_path, tiny_base, std=1e30, targets=["q_proj", "v_proj", "o_proj", "down_proj"]))
    expected = TransformersScorer(engine_config).score([candidates[1]], samples)["nll_sum"].to_pylist()
    for batch in ([wild], [candidates[1]], [wild, candidates[1]]):
        found = ray.get(actor.score.remote(batch, samples), timeout=240)["nll_sum"].to_numpy()
        if batch[0] is wild:
            assert not np.isfinite(found[: len(samples)]).any()
        if batch[-1] is candidates[1]:
            assert found[-len(samples) :].tolist() == pytest.approx(expected, abs=1e-2)


def test_no_process_outlives_the_engine_even_one_that_hangs(actor: Any) -> None:
    """Runs last: nothing is left of the engine."""
    import ray

    processes = ray.get(actor.processes.remote(), timeout=240)
    assert len(set(processes)) == 3
    actor.hang.remote()
    time.sleep(1)
    assert all(map(is_alive, processes))
    os.kill(processes[0], signal.SIGKILL)
    assert all_end(processes, seconds=5)


def test_workers_are_told_to_end_with_the_engine_where_there_are_several(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a placement group of Ray they are vLLM's own processes."""
    from pipeline.engines import vllm

    class StandIn:
        def __init__(self, **arguments: Any):
            self.backend = arguments["distributed_executor_backend"]
            self.called: list[Any] = []

        def collective_rpc(self, function: Any) -> None:
            self.called.append(function)

    monkeypatch.setattr(vllm, "LLM", StandIn)
    one, two = (vllm.VllmScorer(replace(engine_config, tensor_parallel_size=size)).llm for size in (1, 2))
    assert (one.backend, one.called) == ("uni", [])
    assert (two.backend, two.called) == ("mp", [vllm._end_with_parent])


CHILD_OF_A_THREAD = """
import multiprocessing, threading, time
from pipeline.engines.vllm import _end_with_parent

def child(begin, told):
    begin.wait()
    _end_with_parent(None)
    told.set()
    time.sleep(1000)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    begin, told = context.Event(), context.Event()
    process = context.Process(target=child, args=(begin, told))
    starter = threading.Thread(target=process.start)
    starter.start()
    starter.join()
    begin.set()
    told.wait()
    print(process.pid, flush=True)
    time.sleep(1000)
"""


def test_a_worker_that_was_started_by_a_thread_lives_as_long_as_the_process() -> None:
    """vLLM starts the workers on GPUs from threads, which end; the kernel's parent of a process is a thread."""
    parent = subprocess.Popen([sys.executable, "-c", CHILD_OF_A_THREAD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert is_alive(child)
    parent.kill()
    assert all_end([child], seconds=5)
