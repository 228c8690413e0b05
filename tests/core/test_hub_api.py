"""What the Hub is asked for something that a user named, and what is said where it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, this_process_asks
from huggingface_hub import constants

from pipeline.core.errors import InputError
from pipeline.core.hub_api import answer, commit_of, pinned_data


@pytest.fixture
def hub() -> Iterator[None]:
    with this_process_asks({"datasets/org/talk": {}, "org/model": {}}):
        yield


@pytest.mark.usefixtures("hub")
def test_a_data_set_is_pinned_to_the_commit_of_its_revision() -> None:
    pinned = f"hf://datasets/org/talk@{COMMIT}"
    given: dict[str, str] = {
        "hf://datasets/org/talk": pinned,
        "hf://datasets/org/talk@refs%2Fconvert%2Fparquet/default": f"{pinned}/default",
        "hf://datasets/org/talk?split=train_sft": f"{pinned}?split=train_sft",
        f"hf://datasets/org/nobody@{'a' * 40}": f"hf://datasets/org/nobody@{'a' * 40}",  # nothing is to be asked
        "rows.jsonl": "rows.jsonl",
        "s3://bucket/rows.jsonl": "s3://bucket/rows.jsonl",
    }
    assert {path: pinned_data(path) for path in given} == given


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("path", ["hf://datasets/", "hf://datasets/org", "hf://datasets/org?split=x"])
def test_a_data_set_that_is_written_otherwise_is_an_input_error(path: str) -> None:
    with pytest.raises(InputError, match="a data set of the Hub is hf://datasets/"):
        pinned_data(path)


@pytest.mark.usefixtures("hub")
def test_what_the_hub_refuses_is_an_input_error() -> None:
    with pytest.raises(
        InputError,
        match=r"org/none \(nor is org/none there on this machine\): the Hub says no \(404.*HF_TOKEN one that may read it",
    ):
        pinned_data("hf://datasets/org/none")


def test_a_hub_that_is_not_to_be_asked_is_named_as_such() -> None:
    def ask(api: Any) -> Any:
        return api.model_info("org/model")

    with pytest.raises(InputError, match="org/model: the Hub is not asked, as HF_HUB_OFFLINE is set"):
        answer("org/model", ask)


def test_what_a_revision_means_is_told_by_any_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with this_process_asks({"org/model": {"config.json": b"{}", "a/b/config.json": b"{}"}}):
        assert commit_of("org/model", None, "config.json") == commit_of("org/model", "main", "a/b/config.json") == COMMIT
    assert commit_of("org/model", "main", "config.json") == COMMIT  # from the cache
    with pytest.raises(OSError, match="find the requested files"):
        commit_of("org/model", "main", "none.json")
