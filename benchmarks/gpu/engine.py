"""Stage C, with vLLM: the scores of its engine beside those of transformers, an adapter that gives NaN, and its speed.

Each engine runs in a process of its own with the environment that the search gives its workers. One engine with slots for 32
adapters of rank 16 on all linear layers does all but the last check.
"""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.checks import Check, Setting, WrongError, within
from benchmarks.gpu.models import LINEAR, draw_rows, saved_base, shape_of
from benchmarks.pools import random_adapters
from pipeline.cluster.resources import Resources, worker_env
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.engines.scorer import Candidate, EngineConfig, build_scorer
from pipeline.model.base_model import fast_dtype

if importlib.util.find_spec("vllm") is None:
    raise ImportError("No module named 'vllm'")

RANK, SLOTS = 16, 32
COUNTS = (4, 16, 32)
"""Adapters in a batch."""
MADE = 4
"""Adapters of different weights; the others are copies under other names."""
SIZE = 0.3
"""Standard deviation of B, so large that an adapter changes what the base says."""
AGREE = {torch.float32: 2e-3, torch.bfloat16: 0.1}
"""Nats a token by which a sample's mean NLL may differ from transformers', by the type that both compute in."""
MEAN_AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""The same of the mean over all samples of an adapter."""
EFFECT = 0.2
"""Nats a token by which an adapter must change a sample at least once, or nothing is shown."""
HUGE = 1e30
"""What B is multiplied by for an adapter that gives NaN."""

ENGINE: Any = None
"""The scorer of an engine's process."""


class Engine:
    """A scorer in a process of its own."""

    def __init__(self, kind: str, config: EngineConfig):
        self.pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        started = time.perf_counter()
        self.pool.submit(_start, kind, config).result()
        self.start_seconds = time.perf_counter() - started

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> tuple[pa.Table, float]:
        """Scores, in the order of candidates and samples, and the seconds that they took in the engine's process."""
        future: Future[tuple[pa.Table, float]] = self.pool.submit(_score, candidates, samples)
        return future.result()

    def stop(self) -> None:
        self.pool.shutdown()


_kept: dict[str, Engine] = {}


@contextmanager
def _with_slots(setting: Setting) -> Iterator[Engine]:
    """The engine that several checks use; one that died is started anew for the next check."""
    if "slots" not in _kept:
        _kept["slots"] = Engine("vllm", _config(setting))
    try:
        yield _kept["slots"]
    except BrokenProcessPool:
        _kept.pop("slots").stop()
        raise


def agrees_with_transformers(setting: Setting) -> dict[str, Any]:
    """The base and adapters of large effect, scored together by vLLM and one after the other by transformers and PEFT."""
    candidates, samples = [Candidate("base", None), *_adapters(setting, MADE)], _samples(setting, 16)
    oracle = Engine("transformers", _config(setting))
    expected, _ = oracle.score(candidates, samples)
    oracle.stop()
    with _with_slots(setting) as engine:
        found, _ = engine.score(candidates, samples)
    dtype = fast_dtype("auto")
    difference_CS = _nll(found, candidates) - _nll(expected, candidates)
    expected_CS = _nll(expected, candidates)
    figures: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "sample": float(np.abs(difference_CS).max()),
        "mean": float(np.abs(difference_CS.mean(axis=1)).max()),
        "effect": float(np.abs(expected_CS[1:] - expected_CS[0]).max(axis=1).min()),
        "start_s": engine.start_seconds,
    }
    if figures["effect"] < EFFECT:
        raise WrongError("an adapter changes next to nothing", figures)
    return within(figures, {"sample": AGREE[dtype], "mean": MEAN_AGREES[dtype]})


def an_adapter_that_gives_nan(setting: Setting) -> dict[str, Any]:
    """Its scores are no numbers; those beside it, and those after it, are what they were before."""
    good, samples = _adapters(setting, 1), _samples(setting, 8)
    bad = [Candidate("bad", _huge(setting, good[0]))]
    with _with_slots(setting) as engine:
        before, _ = engine.score(good, samples)
        together, _ = engine.score([*bad, *good], samples)
        after, _ = engine.score(good, samples)
    if np.isfinite(_nll(together, bad)).any():
        raise WrongError("the adapter that should give NaN has finite scores")
    expected = _nll(before, good)
    figures = {
        name: float(np.abs(_nll(table, good) - expected).max()) for name, table in (("beside", together), ("after", after))
    }
    return within(figures, {name: AGREE[fast_dtype("auto")] for name in figures})


def loading(setting: Setting) -> dict[str, Any]:
    """Seconds an adapter that the engine has not seen takes beyond those of one that it holds, on one sample."""
    count = 4 if setting.tiny else 16
    adapters, samples = _adapters(setting, count, "new"), _samples(setting, 1)
    with _with_slots(setting) as engine:
        first, again = (engine.score(adapters, samples)[1] for _ in range(2))
    assert adapters[0].folder
    megabytes = (adapters[0].folder / WEIGHTS_FILE).stat().st_size / 1e6
    return {"adapter_s": (first - again) / count, "adapter_mb": megabytes}


def speed_with_adapters(setting: Setting) -> dict[str, Any]:
    """Tokens/s of batches of 4, 16 and 32 adapters that are loaded and warm, and of the base in the same engine."""
    samples = _samples(setting, 2 if setting.tiny else 16)
    with _with_slots(setting) as engine:
        figures = {f"adapters{count}_tokens_s": _speed(engine, _adapters(setting, count), samples) for count in COUNTS}
        return figures | {"base_tokens_s": _speed(engine, [Candidate("base", None)] * COUNTS[0], samples)}


def speed_without_lora(setting: Setting) -> dict[str, Any]:
    """Tokens/s of the base in an engine that serves no adapters."""
    if "slots" in _kept:
        _kept.pop("slots").stop()
    engine = Engine("vllm", replace(_config(setting), max_rank=0))
    try:
        speed = _speed(engine, [Candidate("base", None)] * COUNTS[0], _samples(setting, 2 if setting.tiny else 16))
        return {"base_tokens_s": speed, "start_s": engine.start_seconds}
    finally:
        engine.stop()


def _start(kind: str, config: EngineConfig) -> None:
    global ENGINE
    ENGINE = build_scorer(kind, config)


def _score(candidates: Sequence[Candidate], samples: pa.Table) -> tuple[pa.Table, float]:
    started = time.perf_counter()
    table = ENGINE.score(candidates, samples)
    return table, time.perf_counter() - started


def _speed(engine: Engine, candidates: Sequence[Candidate], samples: pa.Table) -> float:
    """Tokens/s of the better of two passes after one that warms up."""
    tokens = len(candidates) * sum(map(len, samples["input_ids"].to_pylist()))
    return tokens / min([engine.score(candidates, samples)[1] for _ in range(3)][1:])


def _config(setting: Setting) -> EngineConfig:
    os.environ |= worker_env(Resources(cpus=1, gpus=0 if setting.tiny else 1, threads=max(1, (os.cpu_count() or 1) // 2)))[
        "env_vars"
    ]
    return EngineConfig(saved_base(setting, "1B"), "auto", RANK, LINEAR, _length(setting), SLOTS)


def _length(setting: Setting) -> int:
    return 24 if setting.tiny else 512


def _samples(setting: Setting, count: int) -> pa.Table:
    """Rows of one length, the last 16 tokens the answer."""
    return draw_rows([_length(setting)] * count, 16, shape_of(setting, "1B").vocabulary)


def _adapters(setting: Setting, count: int, name: str = "adapter") -> list[Candidate]:
    """Adapters in folders of their own, which an engine knows them by; no more than MADE of them differ."""
    made = setting.scratch / "made"
    if not made.exists():
        random_adapters(made, saved_base(setting, "1B"), MADE, RANK, LINEAR, SIZE)
    sources = sorted(made.iterdir())
    candidates = [Candidate(f"{name}-{number}", setting.scratch / f"{name}-{number}") for number in range(count)]
    for number, candidate in enumerate(candidates):
        assert candidate.folder
        if not candidate.folder.exists():
            candidate.folder.mkdir()
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                os.link(sources[number % MADE] / file, candidate.folder / file)
    return candidates


def _huge(setting: Setting, source: Candidate) -> Path:
    """A copy of an adapter whose products overflow."""
    assert source.folder
    folder = setting.scratch / "huge"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_bytes((source.folder / CONFIG_FILE).read_bytes())
    tensors = load_file(source.folder / WEIGHTS_FILE)
    scaled = {name: tensor * HUGE if ".lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def _nll(table: pa.Table, candidates: Sequence[Candidate]) -> np.ndarray:
    """Mean NLL of each sample under each candidate, nats a token; shape (candidates, samples)."""
    by_name: dict[str, list[float]] = {candidate.adapter_id: [] for candidate in candidates}
    for row in table.to_pylist():
        if row["adapter_id"] in by_name:
            by_name[row["adapter_id"]].append(row["nll_sum"] / row["n_tokens"])
    return np.array([by_name[candidate.adapter_id] for candidate in candidates])


CHECKS: tuple[Check, ...] = (
    agrees_with_transformers,
    an_adapter_that_gives_nan,
    loading,
    speed_with_adapters,
    speed_without_lora,
)
