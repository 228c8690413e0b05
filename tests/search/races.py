"""Races over a small pool with the transformers engine."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from pipeline.adapters.adapter import hash_of
from pipeline.adapters.fetch import fetch_adapter
from pipeline.config import SearchConfig
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.search.batch import candidates_table
from pipeline.search.engine_pool import (
    engine_config,
    score_stream,
)
from pipeline.search.race import Schedule, make_schedule
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import RaceProgress, Work


def work_on(uris: dict[str, str], samples: pa.Table, folder: Folder) -> Work:
    """What is to be done; of adapters that cannot be read the name stands for the hash."""
    hashes = [_hash(uri) or name for name, uri in uris.items()]
    store = ScoreStore.at(folder.sub("store").uri, "base", "transformers", "float32")
    return Work(
        candidates_table([BASE_ID, *uris], [None, *uris.values()], [BASE_ID, *hashes]), samples, store, folder.sub("failures")
    )


def start(
    base: str, work: Work, schedule: Schedule | None = None, seconds: float | None = None, **search: Any
) -> Iterator[RaceProgress]:
    """A race, which scores everything unless there is a schedule."""
    asked = {"engine": "transformers", "dtype": "float32", "adapters_per_batch": 2, "cpus_per_actor": 1, "actors": 1}
    config = SearchConfig(**(asked | search))
    everything = make_schedule(len(work.candidates), len(work.samples), 0, share=1)
    engine = engine_config(base, 5, ["q_proj", "v_proj"], config, max_tokens=64)
    return score_stream(work, engine, config, schedule or everything, seconds)


def run(base: str, work: Work, schedule: Schedule | None = None, seconds: float | None = None, **search: Any) -> RaceProgress:
    """Run a race to its end."""
    *_, last = start(base, work, schedule, seconds, **search)
    assert last.over
    return last


def _hash(uri: str) -> str | None:
    with suppress(AdapterError), TemporaryDirectory() as cache:
        return hash_of(fetch_adapter(uri, Path(cache)))
    return None


def copies(pool: dict[str, Path], count: int, target: Path) -> dict[str, str]:
    """As many adapters of each one: the same weights, and an alpha of its own, which is nearly the same."""
    made: dict[str, str] = {}
    for name, folder in pool.items():
        config = json.loads((folder / CONFIG_FILE).read_text())
        for number in range(count):
            copy = target / f"{name}-{number}"
            copy.mkdir(parents=True)
            (copy / WEIGHTS_FILE).symlink_to(folder / WEIGHTS_FILE)
            (copy / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1e-6 * number}))
            made[copy.name] = str(copy)
    return made


def stored(work: Work) -> pa.Table:
    tables = [work.store.folder.read_table(name) for name in work.store.folder.list_files(".parquet")]
    return pa.concat_tables(tables)
