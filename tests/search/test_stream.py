"""The search on Ray with the transformers engine: every adapter on every sample, once, whatever happens to some of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.config import SearchConfig
from pipeline.engines.scorer import Candidate
from pipeline.engines.transformers import TransformersScorer
from pipeline.merge.adapter import WEIGHTS_FILE
from pipeline.search.store import ScoreFiles
from pipeline.search.stream import Work, engine_config, score_stream
from pipeline.storage import Folder
from pipeline.tables import BASE_ID, SAMPLES

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def samples() -> pa.Table:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "sample_id": f"s{n}",
            "split": "search" if n < 3 else "holdout",
            "input_ids": torch.randint(3, 400, (8 + n,), generator=generator).tolist(),
            "completion_mask": [place > 4 for place in range(8 + n)],
            "learn_mask": [place > 4 for place in range(8 + n)],
        }
        for n in range(4)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, make_adapter: Callable[..., Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pool")
    return {f"a{n}": make_adapter(folder / f"a{n}", tiny_base, rank=2 + n, seed=n, std=0.3) for n in range(4)}


def work_on(uris: dict[str, str], samples: pa.Table, scores: Folder) -> Work:
    names = [BASE_ID, *uris]
    adapters = pa.table([names, [None, *uris.values()]], schema=pa.schema([("adapter_id", pa.string()), ("uri", pa.string())]))
    return Work(adapters, samples, scores)


def run(base: str, work: Work, adapters_per_batch: int = 2) -> dict[str, dict[str, Any]]:
    """Score what is missing. The reports by adapter."""
    search = SearchConfig(
        engine="transformers", dtype="float32", adapters_per_batch=adapters_per_batch, cpus_per_actor=1, actors=1
    )
    todo = replace(work, adapters=ScoreFiles(work.scores).missing(work.adapters, len(work.samples)))
    reports = list(score_stream(todo, engine_config(base, 5, ["q_proj", "v_proj"], search, max_tokens=64), search))
    assert len({report["adapter_id"] for report in reports}) == len(reports)
    return {report["adapter_id"]: report for report in reports}


def test_the_engine_is_told_what_the_pool_needs() -> None:
    search = SearchConfig(adapters_per_batch=3, gpus_per_actor=0, dtype="bfloat16")
    config = engine_config("base", 16, ["v_proj", "up_proj", "q_proj"], search, max_tokens=64)
    assert (config.base, config.dtype) == ("base", "bfloat16")
    assert (config.max_rank, config.adapters_per_batch, config.max_tokens) == (16, 3, 64)
    assert config.target_modules == ("q_proj", "up_proj", "v_proj")
    assert config.tensor_parallel_size == 1


def test_everything_is_scored_once_over_two_runs_and_failures_stop_nothing(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path], make_adapter: Callable[..., Path]
) -> None:
    """The first run, over a part of the pool, stands for one that was killed; in the second, one adapter is now corrupt."""
    uris = {name: str(folder) for name, folder in pool.items()}
    corrupt = make_adapter(tmp_path / "corrupt", tiny_base)
    (corrupt / WEIGHTS_FILE).write_bytes((corrupt / WEIGHTS_FILE).read_bytes()[:-50])
    scores = Folder.at(tmp_path / "scores")

    first = run(tiny_base, work_on({name: uris[name] for name in ("a0", "a1")}, samples, scores))
    assert first.keys() == {BASE_ID, "a0", "a1"}
    assert all(report["reason"] is None and report["tokens"] == 8 + 9 + 10 + 11 for report in first.values())
    assert sum(report["startup"] > 0 for report in first.values()) >= 1

    everything = work_on({**uris, "corrupt": str(corrupt), "removed": str(tmp_path / "removed")}, samples, scores)
    second = run(tiny_base, everything)
    assert second.keys() == {"a2", "a3", "corrupt", "removed"}
    assert {name for name, report in second.items() if report["reason"]} == {"corrupt", "removed"}
    assert second["corrupt"]["tokens"] == 0

    files = ScoreFiles(scores)
    assert files.failures().keys() == {"corrupt", "removed"}
    table = files.scores().to_table()
    counts = Counter(zip(table["adapter_id"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    assert counts == {(name, f"s{n}"): 1 for name in (BASE_ID, *pool) for n in range(4)}
    assert run(tiny_base, everything) == {}

    candidates = [Candidate(BASE_ID, None), *(Candidate(name, folder) for name, folder in pool.items())]
    config = engine_config(tiny_base, 5, ["q_proj", "v_proj"], SearchConfig(dtype="float32"), max_tokens=64)
    keys = [("adapter_id", "ascending"), ("sample_id", "ascending")]
    expected = TransformersScorer(config).score(candidates, samples).sort_by(keys).to_pylist()
    for row, wanted in zip(table.sort_by(keys).to_pylist(), expected, strict=True):
        assert row == {**wanted, "nll_sum": pytest.approx(wanted["nll_sum"], abs=1e-3)}


def test_a_batch_of_which_nothing_can_be_fetched_is_only_a_failure(
    tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    work = work_on({"absent": "hf://no-org/no-adapter", "a0": str(pool["a0"])}, samples, Folder.at(tmp_path / "scores"))
    reports = run(tiny_base, work, adapters_per_batch=1)
    assert {name: bool(report["reason"]) for name, report in reports.items()} == {BASE_ID: False, "absent": True, "a0": False}
    assert "cannot be fetched from the Hub" in ScoreFiles(work.scores).failures()["absent"]


def test_adapters_and_scores_in_an_object_store(
    bucket: str, tmp_path: Path, tiny_base: str, samples: pa.Table, pool: dict[str, Path]
) -> None:
    store = Folder.at(bucket)
    store.upload(pool["a0"], "pool/a0")
    work = work_on({"a0": f"{bucket}/pool/a0"}, samples, store.sub("run", "scores"))
    run(tiny_base, work)
    assert len(ScoreFiles(work.scores).scores().to_table()) == 8
    assert run(tiny_base, work) == {}
