"""The stage `index`: a pool is checked once, and again where it changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.adapters.index import index
from pipeline.config import Config, TargetConfig
from pipeline.core.errors import InputError
from pipeline.core.lock import LockLostError
from pipeline.run_folder import LOCK, Run


def run_on(base: str, folder: Path) -> Run:
    return Run(Config(run=str(folder / "run"), base=base, pool=str(folder / "pool"), target=TargetConfig(train="train.jsonl")))


@pytest.mark.usefixtures("ray_session")
def test_a_pool_is_checked_once_and_again_where_it_changed(
    tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    run, checks = run_on(tiny_base, tmp_path), list[str]()
    make_adapter(tmp_path / "pool/one", tiny_base)
    for _ in range(2):
        index(run, meanwhile=lambda: checks.append("checked"))
    assert checks == ["checked"]
    assert run.folder.read_table("catalogue.parquet")["adapter_id"].to_pylist() == ["one"]
    make_adapter(tmp_path / "pool/two", tiny_base, rank=2)
    index(run)
    assert run.folder.read_table("catalogue.parquet")["adapter_id"].to_pylist() == ["one", "two"]
    assert run.ledger.records["index"]["details"] == {"adapters": 2, "set_aside": 0}


def test_an_unknown_base_is_said_before_anything_starts(tmp_path: Path) -> None:
    run = run_on(str(tmp_path / "none"), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        index(run)
    assert not run.ledger.records


def test_who_lost_the_run_folder_meanwhile_leaves_no_catalogue(
    tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(tiny_base, tmp_path)
    make_adapter(tmp_path / "pool/one", tiny_base)

    def sleep_too_long(*_: object) -> None:
        for name in run.folder.sub(LOCK).list_files():
            run.folder.delete(f"{LOCK}/{name}")

    monkeypatch.setattr(Run, "start_ray", lambda run: None)
    monkeypatch.setattr("pipeline.adapters.index.build_catalogue", sleep_too_long)
    with pytest.raises(LockLostError), run.locked():
        index(run)
    assert not run.folder.exists("catalogue.parquet")
    assert not run_on(tiny_base, tmp_path).ledger.done("index")
