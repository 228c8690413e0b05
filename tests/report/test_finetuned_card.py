"""The card of the finetuned weights: what they are, what they gave on the test split, and whose they partly are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from run_data import RunData

from pipeline.config import Config
from pipeline.report.finetuned_card import finetuned_card


def card(run: RunData, config: Config) -> str:
    return finetuned_card(run.documents["summary.json"], run.documents["selection.json"], config)


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def best_of(run: RunData, init: str) -> dict[str, Any]:
    """The run, with this start's weights the best."""
    found: dict[str, Any] = run.documents["summary.json"]["inits"]
    found[init]["validation_nll_best"] = 0.001
    return found[init]


def test_the_hub_reads_base_relation_and_figures(run_data: RunData, config: Config) -> None:
    arm = best_of(run_data, "mashup")
    data = ModelCard(card(run_data, config)).data
    assert (data.base_model, data["base_model_relation"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "adapter")
    assert (data.library_name, data.pipeline_tag, data.tags) == ("peft", "text-generation", ["lora", "mashup-learning"])
    figures = {one.metric_type: one.metric_value for one in data.eval_results}
    assert figures == {key: arm[f"test_{key}"]["mean"] for key in ("nll", "token_accuracy", "exact_match")}
    assert {(one.dataset_name, one.dataset_split) for one in data.eval_results} == {("medicine/train.jsonl", "test")}


def test_only_weights_from_the_mashup_name_donors_and_their_licence(run_data: RunData, config: Config) -> None:
    best_of(run_data, "mashup")
    text, donors = card(run_data, config), run_data.documents["selection.json"]["donors"]
    assert all(donor["sha256"] in text for donor in donors)
    assert front_matter(text)["license_name"] == "apache-2.0-and-cc-by-nc-4.0-and-unknown"
    best_of(run_data, "base")["validation_nll_best"] = 0.0
    text = card(run_data, config)
    assert not any(donor["sha256"] in text for donor in donors)
    assert "license" not in front_matter(text)
    assert "from the base itself" in text


def test_a_start_that_a_hedge_stopped_has_no_figures_and_says_why(
    run_data: RunData, config: Config, hedged: Callable[..., dict[str, Any]]
) -> None:
    hedged("base")
    text = card(run_data, config)
    assert "| base (stopped after step 33) | – | – | – |" in text
    assert {one.metric_type for one in ModelCard(text).data.eval_results} == {"nll", "token_accuracy", "exact_match"}


def test_bits_that_the_base_had_in_training_are_told(run_data: RunData, config: Config) -> None:
    bits = config.model_copy(update={"train": config.train.model_copy(update={"quantize": "nf4"})})
    assert ", trained with the base in 4 bits (nf4) on " in card(run_data, bits)
    assert "4 bits" not in card(run_data, config)


def test_a_whole_model_is_a_finetune(run_data: RunData, config: Config) -> None:
    full = config.model_copy(update={"train": config.train.model_copy(update={"method": "full"})})
    found = front_matter(card(run_data, full))
    assert (found["base_model_relation"], found["library_name"], found["tags"]) == (
        "finetune",
        "transformers",
        ["mashup-learning"],
    )
    assert "PeftModel" not in card(run_data, full)


@pytest.mark.parametrize(
    ("train", "shown", "listed"),
    [
        ("hf://datasets/org/talk@main/data", "org/talk", ["org/talk"]),
        ("/home/someone/secret/medicine/train.jsonl", "medicine/train.jsonl", None),
        ("s3://inner-bucket/secret/medicine/train.jsonl?region=x", "medicine/train.jsonl", None),
    ],
)
def test_where_data_lie_is_nobody_elses_business(
    run_data: RunData, config: Config, train: str, shown: str, listed: list[str] | None
) -> None:
    target = config.target.model_copy(update={"train": train})
    text = card(run_data, config.model_copy(update={"target": target}))
    assert f"trained on {shown} from" in text
    assert "secret" not in text
    assert front_matter(text).get("datasets") == listed


def test_a_local_base_goes_by_the_id_that_its_donors_name(run_data: RunData, config: Config, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    local = config.model_copy(update={"base": str(tmp_path / "SmolLM2-135M-Instruct")})
    assert front_matter(card(run_data, local))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert str(tmp_path) not in card(run_data, local)
