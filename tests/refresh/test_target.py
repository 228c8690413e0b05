"""One target of a refresh takes over what was found of the pool. The stages after it: tests/refresh/test_refresh.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config, TargetConfig
from pipeline.core.storage import Folder
from pipeline.refresh.target import _take_index, index_pool
from pipeline.run_folder import Run


@pytest.mark.usefixtures("ray_session")
def test_a_pool_is_checked_once_for_all_targets(tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    make_adapter(tmp_path / "pool/one", tiny_base)
    target = TargetConfig(train="train.jsonl")
    config = Config(run=str(tmp_path / "law"), base=tiny_base, pool=str(tmp_path / "pool"), target=target)
    pool = index_pool(config, Folder.at(tmp_path / "index"))
    run = Run(config)
    _take_index(run, pool)
    assert run.folder.read_table("catalogue.parquet").equals(pool.folder.read_table("catalogue.parquet"))
    assert run.ledger.done("index", pool.ledger.key("index"))
    taken = run.folder.modified("catalogue.parquet")
    _take_index(run, pool)
    assert run.folder.modified("catalogue.parquet") == taken
