"""Races over a small pool with the transformers engine."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.config import SearchConfig
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.search.engine_pool import (
    engine_config,
    score_stream,
)
from pipeline.search.race import Plan, make_plan
from pipeline.search.score_store import ScoreStore
from pipeline.search.scoreboard import RaceProgress, Work


def work_on(uris: dict[str, str], samples: pa.Table, folder: Folder) -> Work:
    names = [BASE_ID, *uris]
    columns = [pa.array(names), pa.array([None, *uris.values()], pa.string()), pa.array(names)]
    store = ScoreStore.at(folder.sub("store").uri, "base", "transformers", "float32")
    return Work(pa.table(columns, names=["adapter_id", "uri", "adapter_hash"]), samples, store, folder.sub("failures"))


def start(base: str, work: Work, plan: Plan | None = None, seconds: float | None = None, **search: Any) -> Iterator[RaceProgress]:
    """A race, which scores everything unless there is a plan."""
    asked = {"engine": "transformers", "dtype": "float32", "adapters_per_batch": 2, "cpus_per_actor": 1, "actors": 1}
    config = SearchConfig(**(asked | search))
    everything = make_plan(len(work.candidates), len(work.samples), 0, share=1)
    engine = engine_config(base, 5, ["q_proj", "v_proj"], config, max_tokens=64)
    return score_stream(work, engine, config, plan or everything, seconds)


def run(base: str, work: Work, plan: Plan | None = None, seconds: float | None = None, **search: Any) -> RaceProgress:
    """Run a race to its end."""
    *_, last = start(base, work, plan, seconds, **search)
    assert last.over
    return last


def stored(work: Work) -> pa.Table:
    tables = [work.store.folder.read_table(name) for name in work.store.folder.list_files(".parquet")]
    return pa.concat_tables(tables)
