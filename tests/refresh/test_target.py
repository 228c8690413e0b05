"""One target of a refresh takes over what was found of the pool. The stages after it: tests/refresh/test_refresh.py."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import Config, TargetConfig, TrainConfig
from pipeline.core.errors import InputError
from pipeline.core.lock import LockLostError
from pipeline.core.storage import Folder
from pipeline.refresh import target as target_module
from pipeline.refresh.target import Target, _take_index, index_pool, search_side_by_side
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines


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


def test_a_target_that_cannot_be_searched_with_the_others_stops_none(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One without data; one whose samples are another's, which it leaves to that one; and an engine that fails."""
    samples = {"law": "ab", "sport": "cd", "rugby": "de", "broken": ""}

    def prepare(target: Target) -> None:
        name = Path(target.run.folder.path).name
        if name == "broken":
            raise InputError("broken.jsonl: no such file")
        target.run.folder.write_table("samples.parquet", pa.table({"sample_id": list(samples[name])}))

    searched = list[str]()

    def search(runs: list[Run], engines: Engines) -> None:
        searched.extend(Path(run.folder.path).name for run in runs)
        raise RuntimeError("the engine died")

    monkeypatch.setattr(Target, "prepare", prepare)
    monkeypatch.setattr(target_module, "search_for_merge", search)
    config = {"base": tiny_base, "pool": str(tmp_path / "pool"), "target": TargetConfig(train="train.jsonl")}
    pool = Run(Config(run=str(tmp_path / "index"), **config))
    targets = {name: Target(Config(run=str(tmp_path / name), **config), pool) for name in samples}
    search_side_by_side(targets, Engines(pool.config.search))
    assert searched == ["law", "sport"]
    said = capfd.readouterr().err
    assert "not searched with the others: InputError: broken.jsonl: no such file" in said
    assert "searched one by one: RuntimeError: the engine died" in said
    for target in targets.values():
        with target.run.locked():  # it was released
            pass


def test_a_target_is_finetuned_where_what_is_published_is_not_of_that(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is published once that is not allowed any more."""
    trained = list[str]()

    def train(run: Run) -> None:
        trained.append(run.folder.uri)

    def forbid() -> None:
        raise LockLostError("away")

    monkeypatch.setattr(target_module, "compare", train)
    monkeypatch.setattr(target_module, "training_key", lambda run, current: "key")
    monkeypatch.setattr(target_module, "publish_finetuned", lambda run, published, key: {"uri": "there", "key": key})
    published = Folder.at(tmp_path / "published")
    config = Config(run=str(tmp_path / "law"), base=tiny_base, pool="pool", target=TargetConfig(train="train.jsonl"))
    target = Target(config, Run(config))
    published.write_json("current.json", {"finetuned": {"uri": "there", "key": "key"}})
    assert target.finetune(published, lambda: None) == {"finetuned": "there"}
    assert trained == []
    for stale in ({}, {"finetuned": None}, {"finetuned": {"uri": "old", "key": "another"}}):
        published.write_json("current.json", stale)
        assert target.finetune(published, lambda: None) == {"finetuned": "there"}
    assert trained == [target.run.folder.uri] * 3
    with pytest.raises(LockLostError):
        target.finetune(published, forbid)


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_without_room_for_training_is_said_before_the_search(tiny_base: str, tmp_path: Path) -> None:
    asked = {"train": TrainConfig(cpus_per_worker=1000), "target": TargetConfig(train="train.jsonl")}
    config = Config(run=str(tmp_path / "law"), base=tiny_base, pool="pool", **asked)
    Target(config, Run(config), finetunes=False).run._once_joined(Run(config))
    with pytest.raises(InputError, match="1000"):
        Target(config, Run(config), finetunes=True).run._once_joined(Run(config))
