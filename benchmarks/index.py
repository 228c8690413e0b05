"""What does an index of a large pool on an object store cost, when little of it is new, and after a kill?

    python -m benchmarks.index [--adapters 1000] [--quick] [--search]

A pool of random adapters (rank 16 on all linear layers of a tiny base, 150 kB each) on an S3 server on this machine. Each index
is a run of its own in a process of its own, on a node whose cache of adapters is empty; runs share `search.store`, and with it
the rows of what was checked. The last line is a JSON object with, of each of
    first         all are new
    none          the same pool again
    one, hundred  1 new adapter, then 100
    killed        a pool whose first index was killed, driver and workers, when it had asked for 99 % of the weights
the figures
    ..._new       adapters that were not there before
    ..._requests  of any kind to the server, those of listing and of the rows among them
    ..._gets      of these, GETs of adapters' files
    ..._mb        megabytes that the server sent
    ..._seconds   wall-clock of the stage, Ray's start apart
    ..._driver_mb the most memory of the driver
and `equal`: whether the catalogue after the kill is that of the undisturbed index of the same pool. If not, the exit code is 1.
With `--search`, in place of the other four: `search_...`, of a search of the pool by the transformers engine, on a node whose
cache is empty: 32 samples, a tenth of the cost of scoring everything.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.load import load_base, measured_apart, write_config, write_rows
from benchmarks.pools import random_adapters
from pipeline.adapters.pool import SETTLED
from pipeline.core.file_names import FILES, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.model.base_model import linear_shapes
from tests.store_server import StoreServer

KILLED_AT = 0.99
"""Share of the pool of which the weights were asked for."""

LOOKS = 0.05
"""Seconds between two looks at what was asked."""

BUCKET = "s3://benchmark"


def main(
    adapters: Annotated[int, typer.Option(help="In the pool at first.")] = 1000,
    quick: Annotated[bool, typer.Option(help="A tenth of the adapters.")] = False,
    search: Annotated[bool, typer.Option("--search", help="The first index and a search.")] = False,
) -> None:
    """Measure the five indexes, or one and a search; the last line is a JSON object."""
    server, count = StoreServer(), adapters // 10 if quick else adapters
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": server.endpoint, "RAY_TMPDIR": tempfile.gettempdir()}
    Folder.at(f"{BUCKET}?allow_bucket_creation=true").create()
    with tempfile.TemporaryDirectory() as scratch:
        found = (_index_and_search if search else _measure_all)(server, Path(scratch), count)
    server.stop()
    print(json.dumps({"adapters": count, **found}))
    if not found.get("equal", True):
        raise typer.Exit(1)


def _index_and_search(server: StoreServer, folder: Path, count: int) -> dict[str, Any]:
    base = load_base(folder / "base")
    _upload(folder / "pool", _write_pool(folder, base, count))
    found = _of("first", count, _measured(server, "index", _place(folder / "run", base, "store")))
    typer.echo(f"so far: {found}", err=True)
    config = folder / "run" / "config.yaml"
    measured_apart("samples", config)
    os.environ["TMPDIR"] = str(folder / "run" / "another-node")
    (folder / "run" / "another-node").mkdir()
    return found | _of("search", count, _measured(server, "search", config))


def _write_pool(folder: Path, base: str, count: int) -> list[str]:
    """Names of the adapters, which stay on the disk."""
    shapes, _ = linear_shapes(base)
    leaves = {name.rpartition(".")[2] for name in shapes} - {"lm_head"}
    names: list[str] = random_adapters(folder / "pool", base, count, rank=16, targets=leaves)["adapter_id"].to_pylist()
    return names


def _measure_all(server: StoreServer, folder: Path, count: int) -> dict[str, Any]:
    base, found = load_base(folder / "base"), dict[str, Any]()
    names = _write_pool(folder, base, count + 101)
    for name, new in {"first": names[:count], "none": [], "one": names[count : count + 1], "hundred": names[count + 1 :]}.items():
        _upload(folder / "pool", new)
        found |= _of(name, len(new), _measured(server, "index", _place(folder / name, base, "store")))
        typer.echo(f"so far: {found}", err=True)
    _kill_an_index(server, folder / "broken-off", base, len(names))
    found |= _of("killed", len(names), _measured(server, "index", _place(folder / "killed", base, "other-store")))
    catalogues = [Folder.at(folder / name / "run").read_table("catalogue.parquet") for name in ("hundred", "killed")]
    return found | {"equal": catalogues[0].equals(catalogues[1])}


def _upload(pool: Path, names: list[str]) -> None:
    """Put adapters into the pool, and wait until their files' times tell what comes later."""
    target = Folder.at(f"{BUCKET}/pool")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: target.upload(pool / name, name), names))
    if names:
        time.sleep(SETTLED / 1e9 + 1)


def _place(folder: Path, base: str, store: str) -> Path:
    """The config of a run on a node of its own."""
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)  # where its cache of adapters is
    write_rows(folder / "train.jsonl", 200)
    search = {"store": f"{BUCKET}/{store}", "engine": "transformers", "samples": 32, "budget": 0.1}
    return write_config(folder, base, {"pool": f"{BUCKET}/pool", "search": search})


def _measured(server: StoreServer, stage: str, config: Path) -> dict[str, float]:
    server.requests.clear()
    server.sent.clear()
    measured = measured_apart(stage, config)
    gets = [request for request, _ in server.sent if _reads_an_adapter(request)]
    sent = sum(size for _, size in server.sent)
    return {"requests": len(server.requests), "gets": len(gets), "mb": round(sent / 1e6, 1), **measured}


def _of(name: str, new: int, measured: dict[str, float]) -> dict[str, Any]:
    kept = ("requests", "gets", "mb", "seconds", "driver_mb")
    return {f"{name}_new": new} | {f"{name}_{key}": measured[key] for key in kept}


def _reads_an_adapter(request: str) -> bool:
    return request.startswith("GET /benchmark/pool/") and request.endswith(tuple(FILES))


def _kill_an_index(server: StoreServer, folder: Path, base: str, count: int) -> None:
    """Begin to index the pool, and kill it when it is nearly done."""
    config, asked, seen = _place(folder, base, "other-store"), set[str](), 0
    server.requests.clear()
    command = [sys.executable, "-c", f"from benchmarks.load import measure; measure('index', {str(config)!r})"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while len(asked) < KILLED_AT * count:
        time.sleep(LOOKS)
        fresh = server.requests[seen:]
        seen += len(fresh)
        asked |= {request for request in fresh if request.startswith("GET") and request.endswith(WEIGHTS_FILE)}
        if process.poll() is not None:
            raise RuntimeError("the index ended before it was killed")
    workers = process.children(recursive=True)
    for one in (process, *workers):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs([process, *workers], timeout=30)


if __name__ == "__main__":
    typer.run(main)
