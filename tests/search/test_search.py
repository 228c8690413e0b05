"""The stage `search`: what it needs, and what it depends on."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.errors import InputError
from pipeline.run_folder import Run
from pipeline.search.search import search, search_key


def run_on(base: str, folder: Path, **asked: Any) -> Run:
    target = TargetConfig(train="train.jsonl")
    return Run(Config(run=str(folder), base=base, pool="pool", target=target, search=SearchConfig(**asked)))


def test_it_needs_the_catalogue(tiny_base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the catalogue is not there yet; run `mashup index` first"):
        search(run_on(tiny_base, tmp_path))


def test_it_depends_on_adapters_samples_engine_and_budget_and_on_no_worker(tiny_base: str, tmp_path: Path) -> None:
    def key(hashes: str = "ab", ids: str = "xyz", **asked: Any) -> str:
        catalogue, drawn = pa.table({"adapter_hash": list(hashes)}), pa.table({"sample_id": list(ids)})
        return search_key(run_on(tiny_base, tmp_path, **asked), catalogue, drawn)

    assert key(actors=7, adapters_per_batch=3, cpus_per_actor=2) == key()
    others = [key("ac"), key(ids="xy"), key(engine="transformers"), key(dtype="float16"), key(budget={"share": 0.5})]
    assert len({key(), *others}) == 6
