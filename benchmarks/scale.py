"""What does a search of a thousand adapters of real size cost, and does it find the best?

    python -m benchmarks.scale --base FOLDER --pool FOLDER --target train.jsonl [--adapters 1024] [--samples 32] [--exhaustive]

The adapters are made from the donors of `--pool`: a donor, its B times 0.1 to 1, and noise of 0.02 to 0.6 times the spread of
each matrix. First 100 of them are searched, then all, with `search.budget` 0.1 and vLLM. With `--exhaustive` every adapter is
scored on every search sample, once: the truth, which is kept in `--work`. The last line is a JSON object:
    cost_share      adapter-samples / (adapters x samples)
    busy_share      seconds in which engines score, copying adapters into slots included / (seconds since one is up x engines)
    loads, load_seconds, waited_for_loads   adapters read; seconds of it; seconds that engines waited for it
    recall_at_3     of the 3 best by the truth, how many went through to the end; null: there is no truth
    driver_mb, engine_mb, dispatcher_mb, and each with _growth: over that with 100 adapters
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from safetensors.torch import load_file, save_file

from benchmarks.memory import EnginePeaks, own_peak
from benchmarks.pools import with_states
from pipeline.adapters.adapter import hash_of
from pipeline.adapters.catalogue import build_catalogue, valid_adapters
from pipeline.cluster.connect import connect
from pipeline.config import Config, SearchConfig
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.data.splits import split_of, take_samples
from pipeline.engines.scorer import EngineConfig
from pipeline.model.base_model import fingerprint
from pipeline.search.batch import candidates_table, with_base
from pipeline.search.engine_pool import engine_config, score_stream
from pipeline.search.race import Schedule, make_schedule
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import RaceProgress, Work

FEW = 100
BEST = 3


def main(
    base: Annotated[str, typer.Option(help="Base model folder.")],
    pool: Annotated[str, typer.Option(help="Folder of real donors.")],
    target: Annotated[str, typer.Option(help="train.jsonl of the target task.")],
    adapters: Annotated[int, typer.Option(help="To be made.")] = 1024,
    samples: Annotated[int, typer.Option(help="Of the target, a quarter of them held out.")] = 32,
    exhaustive: Annotated[bool, typer.Option(help="Find the truth, which takes long.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for what is made and for the truth.")] = Path(".cache/scale"),
) -> None:
    """Search the made pool; the last line is a JSON object."""
    connect()
    base = str(Path(base).resolve())
    donors = valid_adapters(build_catalogue(base, pool))
    made = with_states(make_pool(work.resolve() / "pool", donors, adapters), str(work.resolve() / "pool"))
    search = SearchConfig(samples=samples)
    drawn = take_samples(Config(run="-", base=base, pool=pool, target={"train": target}, search=search)).sample
    leaves = {leaf for leaves in donors["target_modules"].to_pylist() for leaf in leaves}
    engine = engine_config(base, max(donors["rank"].to_pylist()), leaves, search, max(map(len, drawn["input_ids"].to_pylist())))
    with tempfile.TemporaryDirectory() as fresh:
        few = measure(made.slice(0, FEW), drawn, engine, search, Path(fresh) / "few")
        found = measure(made, drawn, engine, search, Path(fresh) / "all")
    seen = np.array(found.pop("seen")[1:])
    growth = {f"{kind}_growth": round(found[kind] / few[kind], 3) for kind in ("driver_mb", "engine_mb", "dispatcher_mb")}
    best = best_of(made, drawn, engine, search, work.resolve() / "truth" / fingerprint(base), exhaustive)
    recall = None if best is None else round(float((seen[best] == len(drawn)).mean()), 2)
    print(json.dumps({"adapters": len(made), "samples": len(drawn), **found, **growth, "recall_at_3": recall}))


def make_pool(folder: Path, donors: pa.Table, count: int) -> pa.Table:
    """As many adapters near the donors, each always the same; of schema CANDIDATES."""
    sources = [Path(uri) for uri in donors["uri"].to_pylist()]
    names = [f"near-{number:05}" for number in range(count)]
    for number, name in enumerate(names):
        if not (folder / name / CONFIG_FILE).exists():
            _write_near(sources[number % len(sources)], folder / name, number)
    folders = [folder / name for name in names]
    return candidates_table(names, [*map(str, folders)], [*map(hash_of, folders)])


def _write_near(donor: Path, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, noise = np.random.default_rng(seed).uniform((0.1, 0.02), (1.0, 0.6))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(donor / WEIGHTS_FILE).items():
        weights = tensor.float() * (size if "lora_B" in name else 1.0)
        weights += noise * weights.std() * torch.randn(weights.shape, generator=generator)
        tensors[name] = weights.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copy(donor / CONFIG_FILE, folder)  # last: what has it is whole


def measure(made: pa.Table, drawn: pa.Table, engine: EngineConfig, search: SearchConfig, store: Path) -> dict[str, Any]:
    """One search without known scores; beside its figures `seen`: samples that count for each candidate, the base first."""
    n_search = len(split_of(drawn, "search"))
    schedule = make_schedule(len(made) + 1, n_search, len(drawn) - n_search, 0.1)
    board, up, memory = RaceProgress(), 0.0, EnginePeaks()
    for board in score_stream(_work(made, drawn, store), engine, search, schedule):
        up = up or (time.perf_counter() if board.engines else 0.0)
        memory.look()
    seconds = time.perf_counter() - up
    return {
        "cost_share": round(board.adapter_samples / (len(made) * len(drawn)), 4),
        "busy_share": round(board.seconds / (seconds * board.engines), 3),
        "loads": board.loaded.adapters,
        "load_seconds": round(board.loaded.seconds, 1),
        "waited_for_loads": round(board.waited, 1),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(board.tokens / board.seconds),
        "seen": board.seen,
        "driver_mb": round(own_peak()),
        **memory.found(),
    }


def best_of(
    made: pa.Table, drawn: pa.Table, engine: EngineConfig, search: SearchConfig, store: Path, exhaustive: bool
) -> Any | None:
    """Rows of the best adapters by their mean over all search samples; None: it is not known and not to be found."""
    searched = split_of(drawn, "search")
    work = _work(made, searched, store)
    if exhaustive:
        for board in score_stream(work, engine, search, Schedule((len(searched),), None, 1.0)):
            typer.echo(f"truth: {board.adapter_samples} adapter-samples", err=True)
    known = work.store.load(work.candidates["adapter_hash"].to_pylist(), searched)
    return None if np.isnan(known.nll_NS).any() else np.argsort(known.nll_NS[1:].sum(axis=1), kind="stable")[:BEST]


def _work(made: pa.Table, drawn: pa.Table, store: Path) -> Work:
    return Work(with_base(made), drawn, ScoreStore.at(str(store), "base", "engine", "dtype"), Folder.at(store).sub("failures"))


if __name__ == "__main__":
    typer.run(main)
