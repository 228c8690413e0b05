"""Weights that go to the Hub: with their card, and a config that names the base as others know it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import this_process_asks
from run_data import RunData

from pipeline.core.errors import InputError
from pipeline.core.file_names import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.report.push import push
from pipeline.run_folder import Run

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

Push = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def run(run_data: RunData, tmp_path: Path) -> Folder:
    """A whole run with weights; the config of an adapter names a folder of this machine."""
    folder = run_data.write(tmp_path / "run")
    folder.write_text("report.html", "")
    for weights in ("mashup", "finetuned"):
        folder.write_json(f"{weights}/{CONFIG_FILE}", {"r": 8, "base_model_name_or_path": "/home/someone/base"})
        folder.write_bytes(f"{weights}/{WEIGHTS_FILE}", weights.encode())
    folder.write_text("scores/x.parquet", "")
    return folder


@pytest.fixture
def pushed(run: Folder, monkeypatch: pytest.MonkeyPatch) -> Push:
    """pushed(**asked, token): what `push` says, and the repositories after it."""

    def ask(token: str = "secret", **asked: Any) -> tuple[str, dict[str, Any]]:
        monkeypatch.setenv("HF_TOKEN", token)
        repos: dict[str, Any] = {}
        with this_process_asks(repos):
            try:
                said = push(Run.open(run.uri), "org/new", **asked)
            except InputError as error:
                said = str(error)
        return said, repos

    return ask


@pytest.mark.parametrize("weights", ["mashup", "finetuned"])
def test_weights_arrive_with_their_card_and_the_bases_name_on_the_hub(pushed: Push, weights: str) -> None:
    said, repos = pushed(weights=weights)
    assert "/org/new/commit/" in said
    files = repos["org/new"]
    assert set(files) == {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    assert files[WEIGHTS_FILE] == weights.encode()
    assert json.loads(files[CONFIG_FILE]) == {"r": 8, "base_model_name_or_path": BASE}
    assert f"base_model: {BASE}" in files[CARD_FILE].decode()
    assert ("model-index" in files[CARD_FILE].decode()) == (weights == "finetuned")


def test_by_default_the_finetuned_weights_go_and_without_such_the_mashup(pushed: Push, run: Folder) -> None:
    assert pushed()[1]["org/new"][WEIGHTS_FILE] == b"finetuned"
    run.delete("finetuned")
    assert pushed()[1]["org/new"][WEIGHTS_FILE] == b"mashup"
    said, repos = pushed(weights="finetuned")
    assert "it has no finetuned/" in said
    assert not repos


def test_a_base_that_the_hub_does_not_know_must_be_named(pushed: Push, run: Folder, tmp_path: Path) -> None:
    (tmp_path / "other-name").mkdir()
    run.write_json("config.yaml", run.read_json("config.yaml") | {"base": str(tmp_path / "other-name")})  # JSON is YAML
    said, repos = pushed()
    assert "its id on the Hub is not known; give it, as in --base ORG/NAME" in said
    assert not repos
    assert json.loads(pushed(base="org/base")[1]["org/new"][CONFIG_FILE])["base_model_name_or_path"] == "org/base"


def test_a_run_that_chose_the_base_has_no_mashup_to_give(pushed: Push, run: Folder) -> None:
    run.delete("mashup")
    assert "where the selection chose the base, there is no mashup" in pushed(weights="mashup")[0]


def test_an_upload_without_a_token_is_an_input_error(pushed: Push) -> None:
    said, repos = pushed(token="")
    assert "HF_TOKEN one that may write there?" in said
    assert not repos
