"""The model card: front matter that the Hub can read, every number that a user of the mashup needs, no broken table."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_data import RunData

from pipeline.config import Config
from pipeline.report.model_card import escape_markdown, model_card

SAMPLES = {"search": 96, "holdout": 32}


def card(run: RunData, config: Config) -> str:
    return model_card(run.documents["selection.json"], config, SAMPLES)


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(run_data: RunData, config: Config) -> None:
    assert front_matter(card(run_data, config)) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "apache-2.0-and-cc-by-nc-4.0-and-unknown",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mashup-learning", "merge"],
    }


@pytest.mark.parametrize(
    ("claims", "shown"),
    [
        (("org/model", "org/model"), "org/model"),
        (("org/a", "org/b"), "model"),
        (("/a/model", None), "model"),
        (("evil/other",), "model"),
    ],
)
def test_a_local_base_goes_by_the_id_that_its_donors_name(
    run_data: RunData, config: Config, tmp_path: Path, claims: tuple[str, ...], shown: str
) -> None:
    (tmp_path / "model").mkdir()
    choice = run_data.documents["selection.json"]
    donors = [{**choice["donors"][0], "base_model": claim} for claim in claims]
    text = model_card({**choice, "donors": donors}, config.model_copy(update={"base": str(tmp_path / "model")}), SAMPLES)
    assert front_matter(text)["base_model"] == shown
    assert str(tmp_path) not in text


@pytest.mark.parametrize("base", ["it's: a # path", "a\nlibrary_name: other", "'\"{}[]", "---\n"])
def test_no_base_name_breaks_out_of_the_front_matter(run_data: RunData, config: Config, base: str) -> None:
    text = card(run_data, config.model_copy(update={"base": base}))
    block = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    assert block
    assert yaml.safe_load(block[1]) == {**front_matter(card(run_data, config)), "base_model": base}


def test_layers_that_a_mashup_replaces_whole_are_named(run_data: RunData, config: Config) -> None:
    choice = run_data.documents["selection.json"]
    assert "replaces whole" not in card(run_data, config)
    text = model_card({**choice, "whole_layers": ["lm_head", "model.norm"]}, config, SAMPLES)
    assert "- Layers that it replaces whole: lm_head, model.norm" in text.splitlines()


def test_every_donor_is_named_with_its_hash_and_loss(run_data: RunData, config: Config) -> None:
    text = card(run_data, config)
    for donor in run_data.documents["selection.json"]["donors"]:
        row = next(line for line in text.splitlines() if donor["sha256"] in line)
        assert row.startswith(f"| {donor['adapter_id']} | 0.3333 | {donor['rank']} | {donor['nll']:.4f} | −")


def test_a_donor_that_was_trained_on_the_target_is_named(run_data: RunData, config: Config) -> None:
    donors = run_data.documents["selection.json"]["donors"]
    assert f"Of the donors' own training data: {donors[0]['adapter_id']}: its card names rows.jsonl" in card(run_data, config)
    donors[0]["contamination"] = []
    assert "own training data" not in card(run_data, config)


def test_licences_of_donors_are_listed_and_what_stands_against_them_is_named(run_data: RunData, config: Config) -> None:
    donors = run_data.documents["selection.json"]["donors"]
    text = card(run_data, config)
    rows = [next(line for line in text.splitlines() if donor["sha256"] in line) for donor in donors]
    assert [row.split(" | ")[5] for row in rows] == ["apache-2.0", "cc-by-nc-4.0", "–"]
    assert f"cc-by-nc-4.0 of {donors[1]['adapter_id']} is for non-commercial use alone" in text
    assert f"no licence is declared by {donors[2]['adapter_id']}. A licence is what the donor's own card declares." in text


def test_a_licence_of_all_donors_is_that_of_the_mashup(run_data: RunData, config: Config) -> None:
    for donor in run_data.documents["selection.json"]["donors"]:
        donor["license"] = "apache-2.0"
    text = card(run_data, config)
    assert front_matter(text)["license"] == "apache-2.0"
    assert "To be settled" not in text


def test_no_licence_breaks_out_of_the_front_matter_or_a_table(run_data: RunData, config: Config) -> None:
    donors = run_data.documents["selection.json"]["donors"]
    donors[0]["license"] = "other: a\n---\nlicense: mit | <b> *x* ([a](b))"
    text = card(run_data, config)
    assert front_matter(text)["license"] == "other"
    assert r"| other: a --- license: mit \| \<b\> \*x\* (\[a\](b)) |" in text


def test_the_mashup_and_its_rivals_are_listed_with_their_losses(run_data: RunData, config: Config) -> None:
    text = card(run_data, config)
    for candidate in run_data.documents["selection.json"]["candidates"]:
        assert f"{candidate['holdout_nll']:.4f}" in text
    assert "exact-3 (this one)" in text
    assert "1.5810" in text
    assert "Rank: 48" in text
    assert "Kept energy: 100.0 %" in text
    assert "PeftModel.from_pretrained" in text


def test_ids_cannot_break_a_table(make_run: Callable[..., RunData], config: Config) -> None:
    lines = card(make_run(hostile=True), config).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert columns == {7, 8}
    assert not any("<script>" in line for line in lines)
    assert any(line.startswith(r"| a\|b\`c d |") for line in tables)


def test_words_with_underscores_stay_readable() -> None:
    assert escape_markdown("qa_train_0 _x_ __y__ *z*") == r"qa_train_0 \_x\_ \_\_y\_\_ \*z\*"


def test_a_run_without_a_mashup_has_no_card(config: Config) -> None:
    with pytest.raises(ValueError, match="only a mashup has a model card"):
        model_card({"verdict": "base"}, config, SAMPLES)
