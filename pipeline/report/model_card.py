"""The mashup's model card: a README.md with the front matter that the Hugging Face Hub reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__
from pipeline.adapters.licences import conflicts, front_matter
from pipeline.config import Config
from pipeline.core.base_ref import name_of
from pipeline.report.words import DASH, METHODS, Json, count, nll, percent, signed, single_line

TAGS = ["lora", "mashup-learning", "merge"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


def model_card(selection: Json, config: Config, samples_count: Json) -> str:
    """The card of a merged adapter.

    Args:
        selection: as in selection.json, its verdict 'mashup'.
        samples_count: the number of `search` and `holdout` samples, as samples.json has them.

    Raises:
        ValueError: the verdict is 'base', so that there is no mashup to describe.
    """
    if selection["verdict"] != "mashup":
        raise ValueError(f"selection.json: the verdict is {selection['verdict']!r}; only a mashup has a model card")
    base = base_on_hub(config.base, selection["donors"])
    licence = front_matter([donor["license"] for donor in selection["donors"]])
    front = {"base_model": base, "base_model_relation": "adapter", **licence, "library_name": "peft"}
    parts = [
        front_of(front | {"pipeline_tag": "text-generation", **data_of(config.target.train), "tags": TAGS}),
        "# Mashup of " + count(len(selection["donors"]), "LoRA adapter"),
        _introduction(base, config.target.train),
        "## Donors\n\n" + donor_table(selection["donors"]),
        f"NLL and its difference to the base: nats a completion token on {count(samples_count['search'], 'search sample')}.",
        *_contamination(selection["donors"]),
        licences(selection["donors"]),
        "## Merge\n\n" + _merge_list(selection),
        "## Candidates\n\n" + _candidate_table(selection),
        f"Hold-out NLL: nats a completion token on {count(samples_count['holdout'], 'sample')} that played no part in ranking "
        "the donors. The error is the standard error of the paired difference.",
        "## Use\n\n" + usage(base),
    ]
    return "\n\n".join(parts) + "\n"


def base_on_hub(base: str, donors: Sequence[Json]) -> str:
    """The base as the Hub and other machines know it: of a local folder, the id that all donors name where it ends in
    the folder's name, as a stranger's claim alone is none to send others to, else its name."""
    name = name_of(base)
    if not (Path(name).is_dir() or "://" in name):
        return name
    claims = {donor["base_model"] for donor in donors}
    claim = claims.pop() if len(claims) == 1 else None
    is_same = claim and HUB_ID.fullmatch(claim) and Path(claim).name.lower() == Path(name).name.lower()
    return str(claim) if is_same else Path(name).name


def escape_markdown(text: object) -> str:
    """`text` as one line that Markdown shows as it is, in a table cell too. Underscores inside words are left alone."""
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])", lambda match: "\\" + match[0], single_line(text))


def front_of(fields: Json) -> str:
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def data_of(train: str) -> Json:
    found = HUB_DATA.match(train)
    return {"datasets": [found[1]]} if found else {}


def data_name(train: str) -> str:
    """A data set as others may know it: where it lies on a machine or in a store is nobody else's business."""
    found = HUB_DATA.match(train)
    return found[1] if found else "/".join(train.partition("?")[0].rstrip("/").split("/")[-2:])


def _introduction(base: str, train: str) -> str:
    return (
        f"A LoRA adapter for {escape_markdown(base)}, merged from adapters of earlier finetunes as a start for a new one. "
        f"The donors were chosen by their loss on a sample of {escape_markdown(data_name(train))}. "
        f"Made by mashup-learning {__version__}."
    )


def donor_table(donors: Sequence[Json]) -> str:
    header = ["Adapter", "Weight", "Rank", "NLL", "NLL minus base", "Licence", "SHA-256 of adapter_model.safetensors"]
    return table(header, [_donor_row(donor) for donor in donors])


def _donor_row(donor: Json) -> list[Any]:
    numbers = [f"{donor['weight']:.4g}", donor["rank"], nll(donor["nll"]), signed(donor["nll_minus_base"])]
    return [donor["adapter_id"], *numbers, donor["license"] or DASH, donor["sha256"]]


def _contamination(donors: Sequence[Json]) -> list[str]:
    told = [f"{donor['adapter_id']}: {sentence}" for donor in donors for sentence in donor["contamination"]]
    return ["Of the donors' own training data: " + "; ".join(map(escape_markdown, told)) + "."] if told else []


def licences(donors: Sequence[Json]) -> str:
    said = conflicts({donor["adapter_id"]: donor["license"] for donor in donors})
    remark = "A licence is what the donor's own card declares. The base model's holds besides. This is no legal advice."
    return f"{escape_markdown(said)} {remark}" if said else remark


def _merge_list(selection: Json) -> str:
    recipe, whole = selection["recipe"], selection.get("whole_layers")
    kept = next((one["kept_energy"] for one in selection["candidates"] if one["name"] == recipe["name"]), None)
    lines = [
        f"Method: `{recipe['method']}`, the {METHODS.get(recipe['method'], 'method of that name')}",
        f"Rank: {recipe['rank']}",
        *([f"Layers that it replaces whole: {', '.join(map(escape_markdown, whole))}"] if whole else []),
        f"Kept energy: {percent(kept)} of the squared norm, in the module that lost most",
        f"Why: {escape_markdown(selection['why'])}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _candidate_table(selection: Json) -> str:
    chosen = selection["recipe"]["name"]
    rows = [_candidate_row(candidate, candidate["name"] == chosen) for candidate in selection["candidates"]]
    rows.append(["base, without any adapter", "", "", nll(selection["base_holdout_nll"]), signed(0.0), ""])
    return table(["Candidate", "Donors", "Rank", "Hold-out NLL", "minus base", "Error"], rows)


def _candidate_row(candidate: Json, is_chosen: bool) -> list[Any]:
    name = f"{candidate['name']} (this one)" if is_chosen else candidate["name"]
    losses = [nll(candidate["holdout_nll"]), signed(candidate["holdout_nll_minus_base"]), nll(candidate["stderr"])]
    return [name, ", ".join(candidate["donors"]), candidate["rank"], *losses]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([escape_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def usage(base: str) -> str:
    return "\n".join(
        [
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({base!r})",
            'model = PeftModel.from_pretrained(model, "path/to/this/folder", is_trainable=True)  # or its id on the Hub',
            "```",
        ]
    )
