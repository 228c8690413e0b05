"""When a mashup is published, and what readers find. No cluster: losses on today's samples are given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.core.storage import Folder
from pipeline.refresh import publish as publish_module
from pipeline.refresh.publish import CURRENT, publish, publish_finetuned, training_key
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines

THRESHOLD = 0.01


class Target:
    """A run folder whose selection is set by hand, and where it is published."""

    def __init__(self, base: str, tmp_path: Path, make_adapter: Callable[..., Path]):
        self.base, self.path, self.make_adapter = base, tmp_path, make_adapter
        self.published = Folder.at(tmp_path / "published")

    def select(self, donors: dict[str, str], nll: float = 1.0, seed: int = 0) -> None:
        """`donors`: their ids and hashes; none: the verdict is for the base. `seed` makes the mashup's weights."""
        shutil.rmtree(self.path / "run/mashup", ignore_errors=True)
        best = {"name": f"exact-{len(donors)}", "rank": 4, "donors": list(donors)}
        losses = {"holdout_nll": nll, "holdout_nll_minus_base": nll - 2}
        if donors:
            self.make_adapter(self.path / "run/mashup", self.base, seed=seed)
        selection = {
            "verdict": "mashup" if donors else "base",
            "base_holdout_nll": 2.0,
            "recipe": best if donors else None,
            "donors": [{"adapter_id": name, "adapter_hash": digest, "weight": 1.0} for name, digest in donors.items()],
            "candidates": [best | losses] if donors else [],
        }
        Folder.at(self.path / "run").write_json("selection.json", selection)

    def run(self, **sections: Any) -> Run:
        config = {"run": str(self.path / "run"), "base": self.base, "pool": "pool", "target": {"train": "train.jsonl"}}
        return Run(Config.model_validate(config | sections))

    def publish(self) -> str:
        run = self.run()
        outcome, current = publish(run, Engines(run.config.search), self.published, THRESHOLD)
        assert current == self.current
        return outcome

    def finetune(self, steps: int, rows: str) -> str:
        """Leave what a training of so many steps on these rows does. Gives the key."""
        run = self.run(train={"steps": steps})
        for split in ("train", "validation"):
            run.folder.write_table(f"data/{split}.parquet/0.parquet", pa.table({"sample_id": list(rows)}))
        run.folder.write_text("finetuned/adapter_model.safetensors", f"after {steps}")
        run.folder.write_json("summary.json", {"inits": {"mashup": {"validation_nll_best": 1.0}}})
        return training_key(run, self.current)

    @property
    def current(self) -> dict[str, Any]:
        found: dict[str, Any] = self.published.read_json(CURRENT)
        return found

    @property
    def versions(self) -> int:
        return sum(path.is_dir() for path in (self.path / "published").iterdir())


@pytest.fixture
def target(tiny_base: str, tmp_path: Path, make_adapter: Callable[..., Path]) -> Target:
    return Target(tiny_base, tmp_path, make_adapter)


@pytest.fixture
def published_now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the published mashup's loss on the samples of today."""

    def set_loss(value: float) -> None:
        monkeypatch.setattr(publish_module, "_loss_now", lambda run, engines, current: value)

    return set_loss


def test_a_published_mashup_is_whole_and_named_by_the_pointer(target: Target) -> None:
    target.select({"a": "1", "b": "2"})
    assert target.publish() == "published"
    version = Path(target.current["uri"])
    assert {"adapter_config.json", "adapter_model.safetensors", "selection.json"} <= {file.name for file in version.iterdir()}
    assert json.loads((version / "selection.json").read_text())["verdict"] == "mashup"
    assert (version / "adapter_model.safetensors").read_bytes() == (
        target.path / "run/mashup/adapter_model.safetensors"
    ).read_bytes()
    assert (target.current["recipe"], target.current["holdout_nll"]) == ("exact-2", 1.0)


def test_the_same_mashup_is_not_published_twice(target: Target) -> None:
    target.select({"a": "1"})
    target.publish()
    before = target.current
    target.select({"renamed": "1"})
    assert target.publish() == "kept"
    assert (target.current, target.versions) == (before, 1)


@pytest.mark.parametrize("donors", [{"a": "1"}, {"a": "1", "c": "3"}, {"a": "1", "b": "trained again"}])
def test_other_donors_are_published_and_the_old_version_stays(target: Target, donors: dict[str, str]) -> None:
    target.select({"a": "1", "b": "2"})
    target.publish()
    old = target.current
    target.select(donors, nll=1.2, seed=1)
    assert target.publish() == "published"
    assert target.current["uri"] != old["uri"]
    assert Path(old["uri"], "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("loss_now", "outcome"), [(1.0, "kept"), (1.009, "kept"), (0.9, "kept"), (1.02, "published"), (float("nan"), "published")]
)
def test_other_weights_of_the_same_donors_must_gain(
    target: Target, published_now: Callable[[float], None], loss_now: float, outcome: str
) -> None:
    target.select({"a": "1", "b": "2"})
    target.publish()
    target.select({"b": "2", "a": "1"}, nll=1.0, seed=1)
    published_now(loss_now)
    assert target.publish() == outcome
    assert target.versions == (2 if outcome == "published" else 1)


def test_where_the_base_is_better_the_mashup_is_withdrawn(target: Target) -> None:
    target.select({})
    assert target.publish() == "kept"
    assert (target.current["verdict"], target.current["uri"]) == ("base", None)
    target.select({"a": "1"})
    assert target.publish() == "published"
    target.select({})
    assert target.publish() == "withdrawn"
    assert (target.current["verdict"], target.current["uri"]) == ("base", None)
    assert target.publish() == "kept"
    assert target.versions == 1


def test_another_base_is_another_mashup(target: Target, untied_base: str) -> None:
    target.select({"a": "1"})
    target.publish()
    target.base = untied_base
    assert target.publish() == "published"


def test_finetuned_weights_are_published_beside_the_mashup_and_outlive_it(target: Target) -> None:
    """Until newer ones are there, those of the last version are better than none."""
    target.select({"a": "1"})
    target.publish()
    assert target.current["finetuned"] is None
    key = target.finetune(3, "abc")
    found = publish_finetuned(target.run(), target.published, key)
    assert target.current["finetuned"] == found
    assert (found["start"], found["key"]) == ("mashup", key)
    assert {file.name for file in Path(found["uri"]).iterdir()} == {"adapter_model.safetensors", "summary.json"}
    assert Path(target.current["uri"], "adapter_config.json").is_file()
    target.select({"b": "2"}, seed=1)
    assert target.publish() == "published"
    assert target.current["finetuned"] == found
    target.select({})
    assert target.publish() == "withdrawn"
    assert target.current["finetuned"] == found


def test_other_finetuned_weights_come_of_another_start_other_rows_or_another_training(target: Target) -> None:
    target.select({"a": "1"})
    target.publish()
    key = target.finetune(3, "abc")
    assert target.finetune(3, "abc") == key
    others = {target.finetune(4, "abc"), target.finetune(3, "ab")}
    target.select({"b": "2"}, seed=1)
    target.publish()
    assert len({key, *others, target.finetune(3, "abc")}) == 4
