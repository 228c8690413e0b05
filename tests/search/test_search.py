"""The stage `search`: what it needs, and what it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.adapters.index import index
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.errors import InputError
from pipeline.data.sample import samples
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines
from pipeline.search.search import search, search_key, search_together


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
    others.append(key(rank_by="token_accuracy"))
    assert len({key(), *others}) == 7


@pytest.fixture
def begin(tiny_base: str, write_pool: Callable[[Path], Path], tmp_path: Path) -> Callable[..., Run]:
    """begin(name, target, asked): a run on a pool that all share, up to its samples."""
    pool = str(write_pool(tmp_path / "pool"))

    def make(name: str, target: str, asked: SearchConfig) -> Run:
        folder = str(tmp_path / name)
        run = Run(Config(run=folder, base=tiny_base, pool=pool, target=TargetConfig(train=target), search=asked))
        index(run)
        samples(run)
        return run

    return make


@pytest.mark.usefixtures("ray_session")
def test_searches_side_by_side_end_as_each_alone(
    begin: Callable[..., Run], word_rows: list[dict[str, Any]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    rows = {"one": word_rows, "two": [{**row, "prompt": f"Now {row['prompt']}"} for row in word_rows]}
    asked = SearchConfig(samples=12, engine="transformers", dtype="float32", adapters_per_batch=1, cpus_per_actor=1, actors=1)

    def runs(where: str) -> list[Run]:
        files = {name: write_jsonl(tmp_path / f"{name}.jsonl", content) for name, content in rows.items()}
        return [begin(f"{where}/{name}", file, asked) for name, file in files.items()]

    together, apart = runs("together"), runs("apart")
    search_together(together, Engines(asked))
    for one, other in zip(together, apart, strict=True):
        search(other)
        tables = [run.folder.read_table("leaderboard.parquet") for run in (one, other)]
        assert len(tables[0]) > 2
        assert tables[0].equals(tables[1])
        scored = [run.ledger.records["search"]["details"]["adapter_samples"] for run in (one, other)]
        assert scored[0] == scored[1] > 0
    search_together(together, Engines(asked))  # there is nothing to do


@pytest.mark.usefixtures("ray_session")
def test_scores_that_were_there_before_are_told(
    begin: Callable[..., Run], word_rows: list[dict[str, Any]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    target = write_jsonl(tmp_path / "rows.jsonl", word_rows)
    asked = SearchConfig(samples=12, engine="transformers", adapters_per_batch=1, cpus_per_actor=1, actors=1)
    asked = asked.model_copy(update={"store": str(tmp_path / "store")})
    told = list[dict[str, Any]]()
    for name in ("first", "second"):
        run = begin(name, target, asked)
        search(run)
        told.append(run.ledger.records["search"]["details"])
    used = told[0]["used_samples"]
    assert used == told[0]["adapter_samples"] > 0
    assert [(one["reused_samples"], one["used_samples"]) for one in told] == [(0, used), (used, used)]
