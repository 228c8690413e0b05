"""Refreshes: what they notice, what a failure stops, and a whole home on an S3 server over several of them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import InputError
from pipeline.core.lock import Lock, LockLostError, LockTakenError
from pipeline.core.storage import Folder
from pipeline.core.tables import SEEN
from pipeline.refresh import target
from pipeline.refresh.history import History
from pipeline.refresh.refresh import RefreshConfig, load_refresh, look, refresh
from pipeline.refresh.status import NOTHING_TO_DO, last_success


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A config of two targets whose files are there, and a base and a pool of one file each."""
    for name in ("base/config.json", "pool/a/adapter_config.json", "law.jsonl", "sport.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return {
        "home": str(tmp_path / "home"),
        "base": str(tmp_path / "base"),
        "pool": str(tmp_path / "pool"),
        "targets": {name: {"train": str(tmp_path / f"{name}.jsonl")} for name in ("law", "sport")},
    }


@pytest.fixture
def renewed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of scoring, merging and training: what comes of each target, an exception or columns of the history; with
    `finetune law` and the like of its training."""
    comes: dict[str, Any] = {}

    class Target:
        def __init__(self, config: Any, pool: Any, finetunes: bool) -> None:
            self.name = Folder.at(config.run).path.rpartition("/")[2]
            self.outcome = comes.get(self.name)

        def renew(self, engines: Any, published: Folder, threshold: float, check: Callable[[], None]) -> dict[str, Any]:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            if callable(self.outcome):
                self.outcome()
                check()
            return {"outcome": "kept", "verdict": "base", "donors": [], "adapter_samples": 0}

        def finetune(self, published: Folder, check: Callable[[], None]) -> dict[str, Any]:
            found = comes.get(f"finetune {self.name}", {"finetuned": published.uri})
            if isinstance(found, Exception):
                raise found
            return found() if callable(found) else found

    monkeypatch.setattr(target, "index_pool", lambda config, folder: None)
    monkeypatch.setattr(target, "search_side_by_side", lambda targets, engines: None)
    monkeypatch.setattr(target, "Target", Target)
    return comes


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {name: target["outcome"] for name, target in found["targets"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"treshold": 1},
            "unknown key 'treshold' (known there: home, base, pool, exclude, checkpoints, targets, search, merge, train, track, "
            "threshold)",
        ),
        ({"targets": {"law": {"train": "x", "tset": "y"}}}, "unknown key 'targets.law.tset' (known there: train, validation"),
        ({"targets": {"law": {}}}, "key 'targets.law.train' is missing"),
        ({"targets": {"../law": {"train": "x"}}}, "names a folder: letters, digits"),
        ({"targets": {".law": {"train": "x"}}}, "no dot in front, got '.law'"),
        ({"targets": {}}, "targets: "),
        ({"threshold": -1}, "threshold: "),
        ({"merge": {"k": 0}}, "merge.k: must be from 1"),
        ({"train": {"stepz": 1}}, "unknown key 'train.stepz' (known there: steps"),
        ({"track": {"tensorboard": True}}, "track: there is nothing to track without a training"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(content: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "refresh.yaml"
    file.write_text(yaml.safe_dump(content | change))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_refresh(str(file))
    assert str(caught.value).startswith(f"{file}: ")


def test_a_home_in_the_pool_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its mashups would become donors"):
        RefreshConfig.model_validate(content | {"home": content["pool"] + "/mashups"})
    RefreshConfig.model_validate(content | {"home": content["pool"] + "-mashups"})


@pytest.mark.parametrize("name", ["published", "runs/law", "store"])
def test_a_pool_where_refreshes_write_is_refused(name: str, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="where refreshes write"):
        RefreshConfig.model_validate(content | {"pool": f"{content['home']}/{name}"})
    RefreshConfig.model_validate(content | {"pool": f"{content['home']}/donors.txt"})


def test_what_is_wrong_in_a_targets_run_alone_is_said_at_once(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "refresh.yaml"
    file.write_text(yaml.safe_dump(content | {"search": {"store": f"{content['pool']}/scores"}}))
    with pytest.raises(InputError, match=r"the run of target law: search\.store: .* lies in the pool"):
        load_refresh(str(file))


@pytest.mark.parametrize("place", ["S4://bucket/x.jsonl", "x" * 4000])
def test_a_target_that_cannot_be_looked_at_stops_no_other(place: str, content: dict[str, Any], renewed: dict[str, Any]) -> None:
    renewed["law"] = InputError("no such place")
    content["targets"]["law"]["train"] = place
    found = refresh(RefreshConfig.model_validate(content))
    assert outcomes(found) == {"law": "wrong input", "sport": "kept"}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("pool/b/adapter_config.json", {"law": {"adapters"}, "sport": {"adapters"}}),
        ("base/config.json", {"law": {"base"}, "sport": {"base"}}),
        ("law.jsonl", {"law": {"data"}, "sport": set()}),
    ],
)
def test_what_a_look_tells_apart(content: dict[str, Any], tmp_path: Path, file: str, changed: dict[str, set[str]]) -> None:
    config = RefreshConfig.model_validate(content)
    before = look(config)
    assert look(config) == before
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("another text")
    after = look(config)
    assert {name: {one for one in SEEN if before[name][one] != after[name][one]} for name in before} == changed


def test_settings_take_the_place_of_the_configs(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "refresh.yaml"
    file.write_text(yaml.safe_dump(content))
    config = load_refresh(str(file), ["merge.k=3", "targets.law.max_tokens=64"])
    assert (config.merge.k, config.targets["law"].max_tokens, config.targets["sport"].max_tokens) == (3, 64, 1024)
    assert not config.finetunes
    assert load_refresh(str(file), ["train.steps=3"]).finetunes


def test_settings_are_looked_at_too(content: dict[str, Any]) -> None:
    before = look(RefreshConfig.model_validate(content))["law"]
    for change in ({"threshold": 0.5}, {"merge": {"k": 1}}, {"search": {"samples": 8}}, {"train": {}}):
        after = look(RefreshConfig.model_validate(content | change))["law"]
        assert [name for name in SEEN if before[name] != after[name]] == ["settings"]


def test_an_unknown_base_is_said(content: dict[str, Any]) -> None:
    for base, why in {"/no/such/folder": "no such folder", "nobody/nothing": "unknown base model"}.items():
        with pytest.raises(InputError, match=f"{base}: {why}"):
            refresh(RefreshConfig.model_validate(content | {"base": base}))


def test_a_target_that_fails_stops_no_other_and_is_tried_again(content: dict[str, Any], renewed: dict[str, Any]) -> None:
    config = RefreshConfig.model_validate(content)
    renewed["law"] = RuntimeError("first line\nthe store is away")
    found = refresh(config)
    assert outcomes(found) == {"law": "failed", "sport": "kept"}
    assert (found["status"], found["exit_code"]) == ("failed", 1)
    assert found["targets"]["law"]["reason"] == "RuntimeError: the store is away"

    renewed["law"] = InputError("no such file")
    found = refresh(config, report_noop=True)
    assert outcomes(found) == {"law": "wrong input", "sport": NOTHING_TO_DO}
    assert (found["status"], found["exit_code"]) == ("wrong input", 2)

    renewed["law"] = None
    assert outcomes(refresh(config)) == {"law": "kept", "sport": NOTHING_TO_DO}
    assert refresh(config)["exit_code"] == 0
    assert refresh(config, report_noop=True)["exit_code"] == 3
    history = History.of(Folder.at(content["home"]))
    assert [row["reason"] for row in history.rows if row["target"] == "law"] == [
        "RuntimeError: the store is away",
        "no such file",
        None,
    ]
    assert Folder.at(content["home"]).exists("history.html")


def test_a_target_is_finetuned_where_that_is_asked_and_once_the_engines_have_gone(
    content: dict[str, Any], renewed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose training fails is put down as failed, and is tried again; of one that could not be renewed nothing is trained."""
    assert "finetuned" not in refresh(RefreshConfig.model_validate(content))["targets"]["law"]
    ended = list[bool]()
    monkeypatch.setattr("pipeline.search.engine_pool.Engines.close", lambda engines: ended.append(True))
    content |= {"train": {"steps": 2}}
    config = RefreshConfig.model_validate(content)
    renewed |= {"sport": InputError("no such file"), "finetune sport": AssertionError("it was trained")}
    renewed["finetune law"] = lambda: pytest.fail("the engines are up") if not ended else {"finetuned": "there"}
    found = refresh(config)
    assert outcomes(found) == {"law": "kept", "sport": "wrong input"}
    assert found["targets"]["law"]["finetuned"] == "there"

    renewed |= {"sport": None, "finetune sport": RuntimeError("the disk is full")}
    found = refresh(config)
    assert outcomes(found) == {"law": NOTHING_TO_DO, "sport": "failed"}
    assert found["targets"]["sport"]["reason"] == "RuntimeError: the disk is full"
    assert found["exit_code"] == 1
    renewed["finetune sport"] = {"finetuned": "there"}
    assert outcomes(refresh(config)) == {"law": NOTHING_TO_DO, "sport": "kept"}
    assert [row["outcome"] for row in History.of(Folder.at(content["home"])).rows if row["target"] == "sport"] == [
        "kept",
        "wrong input",
        "failed",
        "kept",
    ]


@pytest.mark.usefixtures("renewed")
def test_what_training_is_tracked_with_is_looked_for_first(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.tracking.find_spec", lambda name: None)
    with pytest.raises(InputError, match="install tensorboardX"):
        refresh(RefreshConfig.model_validate(content | {"train": {}, "track": {"tensorboard": True}}))


def test_how_it_went_is_noted_also_where_there_was_nothing_to_do(
    content: dict[str, Any], renewed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[tuple[Any, ...]]()
    monkeypatch.setattr("pipeline.cluster.telemetry.tell_refresh", lambda *figures: told.append(figures[1:]))
    config, home = RefreshConfig.model_validate(content), Folder.at(content["home"])
    renewed["sport"] = RuntimeError("the store is away")
    refresh(config)
    noted = home.read_json("status.json")["targets"]
    assert {name: one["outcome"] for name, one in noted.items()} == {"law": "kept", "sport": "failed"}
    assert told == [("law", last_success(noted["law"]), noted["law"]["outcomes"]), ("sport", 0.0, noted["sport"]["outcomes"])]
    renewed["sport"] = None
    refresh(config)
    told.clear()
    refresh(config)
    noted = home.read_json("status.json")["targets"]
    assert [one["outcome"] for one in noted.values()] == [NOTHING_TO_DO] * 2
    assert noted["law"]["outcomes"][NOTHING_TO_DO] == 2
    assert told == []


def test_one_refresh_at_a_time(content: dict[str, Any], renewed: dict[str, Any]) -> None:
    """The second begins while the first is at work."""
    config = RefreshConfig.model_validate(content)
    refused: list[str] = []

    def another() -> None:
        with pytest.raises(LockTakenError) as caught:
            refresh(config)
        refused.append(str(caught.value))

    renewed["law"] = another
    assert outcomes(refresh(config)) == {"law": "kept", "sport": "kept"}
    assert len(refused) == 1


def test_who_lost_the_lock_writes_nothing_down(content: dict[str, Any], renewed: dict[str, Any]) -> None:
    home = Folder.at(content["home"])

    def sleep_too_long() -> None:
        for name in home.sub("lock").list_files():
            home.sub("lock").delete(name)

    renewed["sport"] = sleep_too_long
    with pytest.raises(LockLostError):
        refresh(RefreshConfig.model_validate(content))
    assert [row["target"] for row in History.of(home).rows] == ["law"]


def test_a_refresh_that_is_stopped_keeps_what_was_done(
    content: dict[str, Any], renewed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Folder.at(content["home"])

    def stop() -> None:
        raise KeyboardInterrupt

    renewed["sport"] = stop
    with pytest.raises(KeyboardInterrupt):
        refresh(RefreshConfig.model_validate(content))
    assert [row["target"] for row in History.of(home).rows] == ["law"]
    assert home.exists("history.html")
    with Lock(home.sub("lock")):  # it was released
        pass


class Scheduled:
    """A home on an S3 server that is refreshed again and again."""

    def __init__(self, bucket: str, base: str, tmp_path: Path):
        self.home, self.pool = Folder.at(f"{bucket}/mashups"), Folder.at(f"{bucket}/pool")
        self.file = tmp_path / "refresh.yaml"
        self.content: dict[str, Any] = {
            "home": self.home.uri,
            "base": base,
            "pool": self.pool.uri,
            "targets": {},
            "search": {"samples": 16, "engine": "transformers", "adapters_per_batch": 2, "cpus_per_actor": 1},
            "merge": {"k": 2, "weights": "equal"},
        }

    def refresh(self) -> dict[str, Any]:
        self.file.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return refresh(load_refresh(str(self.file)))

    def in_a_process(self) -> tuple[dict[str, Any], str]:
        """As a scheduler does it: the last line, and every module that was imported."""
        command = [sys.executable, "-X", "importtime", "-m", "jobs.refresh", str(self.file), "--exit-code"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ending = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == ending["exit_code"], done.stderr[-2000:]
        return ending, done.stderr

    def published(self, target: str) -> list[tuple[str, int, int]]:
        return self.home.sub("published", target).state()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_home_over_several_refreshes(
    bucket: str,
    tiny_base: str,
    make_adapter: Callable[..., Path],
    train_donor: Callable[[Path, int], None],
    word_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    scheduled = Scheduled(bucket, tiny_base, tmp_path)
    for seed in (1, 2):
        train_donor(tmp_path / f"adapters/related-{seed}", seed)
    Folder.at(bucket).upload(tmp_path / "adapters", "pool")
    words = {"train": write_jsonl(tmp_path / "words.jsonl", word_rows)}
    fewer = {"train": write_jsonl(tmp_path / "fewer.jsonl", word_rows[::2])}
    other = {"train": write_jsonl(tmp_path / "other.jsonl", [{**row, "prompt": f"Now {row['prompt']}"} for row in word_rows])}

    # Three targets, all new. What two of them share is scored once, and two that share nothing are searched side by side.
    scheduled.content["targets"] = {"words": words, "fewer": fewer, "other": other}
    found = scheduled.refresh()
    assert outcomes(found) == {"words": "published", "fewer": "published", "other": "published"}
    assert found["targets"]["words"]["adapter_samples"] == 3 * 16  # the base and two donors
    assert 0 < found["targets"]["fewer"]["adapter_samples"] < 3 * 16
    assert found["targets"]["other"]["adapter_samples"] == 3 * 16
    assert "words: scored 48 adapter-samples" in (said := capfd.readouterr().err)
    assert "other: scored 48 adapter-samples" in said
    assert "one by one" not in said
    _check_published(scheduled.home, found["targets"]["words"])
    published = scheduled.published("words")

    # Again: nothing is done, and what could do it is not even imported.
    ending, modules = scheduled.in_a_process()
    assert (ending["status"], ending["exit_code"]) == (NOTHING_TO_DO, 3)
    assert outcomes(ending) == dict.fromkeys(("words", "fewer", "other"), NOTHING_TO_DO)
    assert re.search(r"\| +pipeline\.refresh$", modules, re.M)
    assert not re.search(r"\| +(torch|ray|transformers|matplotlib)$", modules, re.M)

    # A new adapter that helps nobody: it alone is scored, and readers keep what they have.
    make_adapter(tmp_path / "new/random", tiny_base, rank=2, seed=1, std=0.1)
    Folder.at(bucket).upload(tmp_path / "new", "pool")
    scheduled.content["targets"] = {"words": words}
    found = scheduled.refresh()["targets"]["words"]
    assert (found["outcome"], found["changed"], found["adapter_samples"]) == ("kept", ["adapters"], 16)
    assert scheduled.published("words") == published

    # The same donors, merged with a loss; and a target without data, which stops nothing.
    scheduled.content["targets"] = {"broken": {"train": str(tmp_path / "none.jsonl")}, "words": words}
    scheduled.content["merge"]["rank"] = 1
    found = scheduled.refresh()
    assert outcomes(found) == {"broken": "wrong input", "words": "kept"}
    assert found["exit_code"] == 2
    assert "none.jsonl: no such file" in found["targets"]["broken"]["reason"]
    assert (found["targets"]["words"]["changed"], found["targets"]["words"]["adapter_samples"]) == (["settings"], 0)
    assert scheduled.published("words") == published
    history = History.of(scheduled.home)
    assert [row["target"] for row in history.rows] == ["words", "fewer", "other", "words", "broken", "words"]
    assert history.rows[-1]["nll_minus_base"] > history.rows[0]["nll_minus_base"]

    # Finetuned from what was chosen; the published mashup stays, and there is nothing to do after it.
    scheduled.content["targets"] = {"words": words}
    scheduled.content["train"] = {"steps": 2, "batch_size": 4, "learning_rates": [1e-3, 1e-4], "evaluations": 1}
    found = scheduled.refresh()["targets"]["words"]
    assert found["outcome"] == "kept"
    current = scheduled.home.read_json("published/words/current.json")
    assert (current["finetuned"]["uri"], current["finetuned"]["start"]) == (found["finetuned"], "mashup")
    finetuned = Folder.at(found["finetuned"])
    assert finetuned.list_files() == ["README.md", "adapter_config.json", "adapter_model.safetensors", "summary.json"]
    assert finetuned.read_json("summary.json")["inits"].keys() == {"mashup"}
    assert scheduled.published("words")[0] == published[0]
    ending, _ = scheduled.in_a_process()
    assert ending["status"] == NOTHING_TO_DO
    assert scheduled.home.read_json("status.json")["targets"]["words"]["outcomes"][NOTHING_TO_DO] == 2


def _check_published(home: Folder, found: dict[str, Any]) -> None:
    current = home.read_json("published/words/current.json")
    assert current["uri"] == found["mashup"]
    version = Folder.at(current["uri"])
    assert version.list_files() == ["README.md", "adapter_config.json", "adapter_model.safetensors", "selection.json"]
    assert [donor["adapter_id"] for donor in current["donors"]] == found["donors"]
    assert current["holdout_nll"] - current["base_holdout_nll"] == pytest.approx(found["nll_minus_base"])
    assert found["nll_minus_base"] < 0
    assert home.exists("history.html")
