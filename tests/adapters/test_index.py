"""The stage `index`: a pool is checked once, and again where it changed."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.adapters.index import index, reasons
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
        index(run, meanwhile=lambda found: checks.append("checked"))
    assert checks == ["checked"]
    assert run.folder.read_table("catalogue.parquet")["adapter_id"].to_pylist() == ["one"]
    make_adapter(tmp_path / "pool/two", tiny_base, rank=2)
    index(run)
    assert run.folder.read_table("catalogue.parquet")["adapter_id"].to_pylist() == ["one", "two"]
    assert run.ledger.records["index"]["details"] == {"adapters": 2, "set_aside": 0}


def test_reasons_are_told_by_kinds_and_lost_donors_first() -> None:
    told = {
        "a": "wrong base: it adapts model.layers.7",
        "b": "wrong base: it adapts model.layers.9",
        "c": "duplicate of z: same weights and scaling",
        "d": "duplicate of y: same weights and scaling",
        "e": "duplicate of x: same weights and scaling",
        "f": "cannot be fetched from s3://b/f (it is gone)",
        "g": "changes the head (lm_head), which vLLM cannot score",
        "h": None,
    }
    status = ["set_aside" if reason else "ok" for reason in told.values()]
    catalogue = pa.table({"adapter_id": list(told), "status": status, "reason": list(told.values())})
    assert reasons(catalogue) == [
        "2 x wrong base, such as a: wrong base: it adapts model.layers.7",
        "1 x cannot be fetched from s3, such as f: cannot be fetched from s3://b/f (it is gone)",
        "1 x changes the head, such as g: changes the head (lm_head), which vLLM cannot score",
        "3 x duplicate, such as c: duplicate of z: same weights and scaling",
    ]
    assert reasons(catalogue.slice(7)) == []


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
