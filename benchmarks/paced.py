"""Does a search of adapters of real size spend its time scoring, or loading?

    python -m benchmarks.paced [--quick] [--rank 16] [--adapters 512] [--engines 1] [--place disk]

A CPU scores so slowly that loading hides behind it. So here the engine's forward pass sleeps, 40 microseconds a token as a 7B
model on an H100 would take, and gives losses that are made up; everything else is real: the stream, the race, files, caches,
checks, vLLM's reading of adapters and their way into slots, the store. Adapters are of all linear layers of a 7B Llama: 80 MB at
rank 16, 320 MB at rank 64. `--place s3`: they and the scores are on an S3-protocol server on this machine that answers each
request after 25 ms. The search is that of `search.budget` 0.1 over 128 samples of 300 tokens.

The last line is a JSON object; three of the figures again for engines that read adapters when they are to be scored:
    busy_share          seconds inside the engines' forward pass / (seconds since an engine is up x engines)
    cost_share          adapter-samples / (adapters x samples)
    loads, load_seconds, waited_for_loads   adapters read; seconds of it; seconds that engines waited for it
    read_gb_per_second  bytes read into memory / seconds of the race
    disk_gb_per_second  of one plain read of such a file, with its hash, by one thread
    race_seconds, driver_mb, engine_mb, dispatcher_mb
    recall_at_3         of the three best by all search samples, how many went through to the end
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import ray
import torch
import typer
from peft import LoraConfig
from safetensors.torch import save_file

from benchmarks.memory import EnginePeaks, own_peak
from benchmarks.pools import random_samples, with_states
from pipeline.adapters.adapter import content_hash, file_sha256
from pipeline.adapters.tensor_names import PREFIX
from pipeline.config import SearchConfig
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.core.tables import SCORES
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded, Scorer
from pipeline.search import engine_pool
from pipeline.search.batch import candidates_table, with_base
from pipeline.search.race import make_schedule
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import RaceProgress, Work
from tests.store_server import StoreServer

LAYERS, HIDDEN, INNER = 32, 4096, 11008
SECONDS_A_TOKEN = 40e-6
SAMPLES, HOLDOUT, LENGTH = 96, 32, 300
BATCH = 16
DELAY = 0.025
LEAVES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
"""Features in and out."""


def main(
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    adapters: Annotated[int, typer.Option(help="In the pool.")] = 512,
    engines: Annotated[int, typer.Option(help="At work at a time.")] = 1,
    place: Annotated[str, typer.Option(help="disk or s3.")] = "disk",
    quick: Annotated[bool, typer.Option(help="An eighth of the adapters.")] = False,
) -> None:
    """Search a pool with paced engines; the last line is a JSON object."""
    count = adapters // 8 if quick else adapters
    with tempfile.TemporaryDirectory() as scratch, _store(place) as store:
        folder = Path(scratch)
        pool = write_pool(folder / "pool", count, rank)
        speed = _plain_speed(Path(pool["uri"][-1].as_py()) / WEIGHTS_FILE)
        pool = with_states(upload(pool, store) if store else pool, f"{store or folder}/pool")
        found = measure(folder, store or str(folder / "store"), pool, rank, engines)
        without = measure(folder, store or str(folder / "another-store"), pool, rank, engines, ahead=False)
        found |= {f"{name}_when_not_read_ahead": without[name] for name in ("busy_share", "waited_for_loads", "race_seconds")}
    asked = {"rank": rank, "adapters": count, "engines": engines, "place": place, "disk_gb_per_second": speed}
    print(json.dumps(asked | found))


@contextmanager
def _store(place: str) -> Iterator[str | None]:
    """The bucket of a server that takes its time; None: there is none."""
    if place != "s3":
        yield None
        return
    server = StoreServer()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": server.endpoint}
    Folder.at("s3://paced?allow_bucket_creation=true").create()
    server.refuse = _late
    yield "s3://paced"
    server.stop()


def _late(request: str) -> bool:
    time.sleep(DELAY)
    return False


def upload(pool: pa.Table, store: str) -> pa.Table:
    """Put a pool into a bucket, and remove it from the disk."""
    for name, folder in zip(pool["adapter_id"].to_pylist(), map(Path, pool["uri"].to_pylist()), strict=True):
        Folder.at(f"{store}/pool").upload(folder, name)
        shutil.rmtree(folder)
    return pool.set_column(1, "uri", pa.array([f"{store}/pool/{name}" for name in pool["adapter_id"].to_pylist()]))


def write_pool(folder: Path, count: int, rank: int) -> pa.Table:
    """As many adapters, each with weights of its own; of schema CANDIDATES."""
    tensors = _random_tensors(rank)
    rows: list[tuple[str, str, str]] = []
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted({leaf.rpartition(".")[2] for leaf in LEAVES}), task_type="CAUSAL_LM"
    )
    first = next(iter(tensors))
    for number in range(count):
        place = folder / f"adapter-{number:05}"
        place.mkdir(parents=True)
        tensors[first][0, 0] = number
        save_file(tensors, place / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(place))
        rows.append((place.name, str(place), content_hash(file_sha256(place / WEIGHTS_FILE), config)))
    return candidates_table(*zip(*rows, strict=True))


def measure(folder: Path, place: str, pool: pa.Table, rank: int, engines: int, ahead: bool = True) -> dict[str, Any]:
    """One search, its scores at `place`; `ahead`: whether engines read a batch's adapters while they score another."""
    PacedActor.ahead = ahead
    ray.init(address="local", num_cpus=engines + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    engine_pool.ScoringActor = PacedActor  # type: ignore[misc]
    search = SearchConfig(
        engine="vllm", dtype="bfloat16", adapters_per_batch=BATCH, cpus_per_actor=1, gpus_per_actor=0, actors=engines
    )
    leaves = {leaf.rpartition(".")[2] for leaf in LEAVES}
    config = engine_pool.engine_config("paced", rank, leaves, search, LENGTH)
    samples = random_samples(SAMPLES + HOLDOUT, LENGTH, 1000)
    store = ScoreStore.at(place, "base", "engine", "read-ahead" if ahead else "not-read-ahead")
    work = Work(with_base(pool), samples, store, Folder.at(place).sub("failures"))
    schedule = make_schedule(len(pool) + 1, SAMPLES, HOLDOUT, 0.1)
    board, began, up, memory = RaceProgress(), time.perf_counter(), 0.0, EnginePeaks()
    for board in engine_pool.score_stream(work, config, search, schedule):
        up = up or (time.perf_counter() if board.engines else 0.0)
        memory.look()
    ended = time.perf_counter()
    ray.shutdown()
    return memory.found() | _figures(board, pool, ended - began, ended - up, engines)


def _figures(board: RaceProgress, pool: pa.Table, wall: float, up: float, engines: int) -> dict[str, Any]:
    truth = np.argsort([_loss(name, range(SAMPLES)) for name in pool["adapter_id"].to_pylist()])[:3] + 1
    seen = np.array(board.seen)
    return {
        "busy_share": round(board.tokens * SECONDS_A_TOKEN / (up * engines), 3),
        "cost_share": round(board.adapter_samples / (len(pool) * (SAMPLES + HOLDOUT)), 3),
        "loads": board.loaded.adapters,
        "load_seconds": round(board.loaded.seconds, 1),
        "waited_for_loads": round(board.waited, 1),
        "read_gb_per_second": round(board.loaded.bytes / up / 1e9, 2),
        "scoring_seconds": round(board.seconds, 1),
        "race_seconds": round(wall, 1),
        "seconds_up": round(up, 1),
        "recall_at_3": round(float((seen[truth] == SAMPLES + HOLDOUT).mean()), 2),
        "driver_mb": round(own_peak()),
    }


class Slots:
    """Stands for vLLM's engine: its worker's manager reads adapters with vLLM's code, and they are copied into slots."""

    def __init__(self, count: int, rank: int) -> None:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        leaves = {leaf.rpartition(".")[2] for leaf in LEAVES}
        self.lora_manager = self.model_runner = self._adapter_manager = self
        self.modules = [f"model.layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in LEAVES]
        self.packed_modules: dict[str, list[str]] = {}
        self._slots = [_random_tensors(rank) for _ in range(count)]
        self._next = 0
        self._load_adapter = lambda request: LoRAModel.from_local_checkpoint(
            request.lora_path,
            leaves,
            peft_helper=PEFTHelper.from_local_dir(request.lora_path, None),
            lora_model_id=request.lora_int_id,
            device="cpu",
            dtype=torch.bfloat16,
        )

    def collective_rpc(self, function: Any) -> list[Any]:
        return [function(self)]

    def add_lora(self, request: Any) -> None:
        model, slot = self._load_adapter(request), self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        for name, weights in model.loras.items():
            slot[f"{PREFIX}{name}.lora_A.weight"].copy_(weights.lora_a)
            slot[f"{PREFIX}{name}.lora_B.weight"].copy_(weights.lora_b)

    def remove_lora(self, number: int) -> None: ...


class PacedScorer:
    """An engine whose forward pass sleeps."""

    def __init__(self, config: EngineConfig, ahead: bool) -> None:
        from pipeline.engines.vllm_adapters import HeldAdapters

        slots = Slots(config.adapters_per_batch, config.max_rank)
        self.adapters = HeldAdapters(slots, config.adapters_per_batch, config.kept_bytes or 0, ahead)

    @property
    def loaded(self) -> Loaded:
        return self.adapters.loaded

    def load_ahead(self, candidate: Candidate) -> None:
        if candidate.folder:
            self.adapters.read_ahead(candidate.folder)

    def let_go_first(self, folders: Collection[Path]) -> None:
        self.adapters.let_go_first(folders)

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        self.adapters.hold([candidate.folder for candidate in candidates if candidate.folder])
        tokens = len(candidates) * sum(len(ids) for ids in samples["input_ids"])
        time.sleep(tokens * SECONDS_A_TOKEN)
        names = samples["sample_id"].to_pylist()
        rows = [(one.adapter_id, name, _loss(one.adapter_id, [int(name)]), 8, 0) for one in candidates for name in names]
        return pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCORES)


class PacedActor(engine_pool.ScoringActor):
    ahead = True

    def _start(self, engine: str, config: EngineConfig, work: Work) -> Scorer:
        return PacedScorer(config, self.ahead)


def _loss(name: str, samples: Sequence[int]) -> float:
    """Made up: a skill of each adapter, a difficulty of each sample, and noise, in nats over 8 tokens."""
    skill = _drawn(name, "skill")
    return sum(8 * (2 + 0.5 * skill + _drawn("sample", str(n)) + 0.3 * _drawn(name, str(n))) for n in samples)


def _drawn(*what: str) -> float:
    """A number that is always the same for the same words, as if drawn from a normal distribution."""
    seed = int.from_bytes(hashlib.blake2b("/".join(what).encode(), digest_size=8).digest(), "little")
    return float(np.random.default_rng(seed).standard_normal())


def _random_tensors(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for leaf, (inputs, outputs) in LEAVES.items():
            name = f"{PREFIX}model.layers.{layer}.{leaf}"
            made[f"{name}.lora_A.weight"] = torch.randn(rank, inputs).bfloat16()
            made[f"{name}.lora_B.weight"] = torch.randn(outputs, rank).bfloat16()
    return made


def _plain_speed(file: Path) -> float:
    os.posix_fadvise(handle := os.open(file, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    started = time.perf_counter()
    file_sha256(file)
    return round(file.stat().st_size / (time.perf_counter() - started) / 1e9, 2)


if __name__ == "__main__":
    typer.run(main)
