"""The model card of the best finetuned weights, with what they gave on the test split."""

from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.adapters.licences import front_matter
from pipeline.config import Config
from pipeline.core.stats import best_init
from pipeline.report.model_card import (
    base_on_hub,
    data_name,
    data_of,
    donor_table,
    escape_markdown,
    front_of,
    licences,
    table,
    usage,
)
from pipeline.report.words import Json, measured, measures, stopped_at
from pipeline.run_folder import Run


def write_finetuned_card(run: Run) -> None:
    """Put the card beside the weights that a comparison left."""
    summary, selection = run.folder.read_json("summary.json"), run.folder.read_json("selection.json")
    run.folder.write_text("finetuned/README.md", finetuned_card(summary, selection, run.config))


def finetuned_card(summary: Json, selection: Json, config: Config) -> str:
    """The card of the best finetuned weights.

    Args:
        summary, selection: as in summary.json and selection.json.
    """
    base, init = base_on_hub(config.base, selection["donors"]), best_init(summary["inits"])
    donors = selection["donors"] if init == "mashup" else []
    is_adapter = config.train.method == "lora"
    parts = [
        front_of(_front(base, donors, is_adapter, config) | {"model-index": [_index(init, summary, config)]}),
        f"# {Path(base).name}, finetuned",
        _introduction(base, init, summary["inits"][init], is_adapter, config),
        "## Evaluation\n\n" + _metric_table(summary),
        "On the test split, which neither training nor any choice has seen: means over seeds, of each start at its best rate.",
        *(["## Donors of the mashup\n\n" + donor_table(donors), licences(donors)] if donors else []),
        "## Use\n\n" + (usage(base) if is_adapter else _usage_of_model()),
    ]
    return "\n\n".join(parts) + "\n"


def _front(base: str, donors: list[Json], is_adapter: bool, config: Config) -> dict[str, Any]:
    kind = {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    licence = front_matter([donor["license"] for donor in donors]) if donors else {}
    library = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    tags = [*(["lora"] if is_adapter else []), "mashup-learning"]
    return {**kind, **licence, **library, **data_of(config.target.train), "tags": tags}


def _index(init: str, summary: Json, config: Config) -> Json:
    """The figures of a start, as the Hub shows them."""
    name, arm = data_name(config.target.train), summary["inits"][init]
    kinds = {"test_metric": summary.get("metric")}
    found = [
        {"type": kinds.get(one.key) or one.key.removeprefix("test_"), "name": one.name, "value": arm[one.key]["mean"]}
        for one in measures(summary)
    ]
    kind = data_of(config.target.train).get("datasets", ["custom"])[0]  # the Hub links it to a data set of that id
    result = {"task": {"type": "text-generation"}, "dataset": {"name": name, "type": kind, "split": "test"}, "metrics": found}
    return {"name": f"finetuned from the {init}", "results": [result]}


def _introduction(base: str, init: str, arm: Json, is_adapter: bool, config: Config) -> str:
    start = {"base": "the base itself", "mashup": "the mashup of the donors below"}.get(init, f"the start `{init}`")
    how = "trained" if config.train.quantize == "none" else f"trained with the base in 4 bits ({config.train.quantize})"
    return (
        f"{'A LoRA adapter for' if is_adapter else 'A finetune of'} {escape_markdown(base)}, {how} on "
        f"{escape_markdown(data_name(config.target.train))} from {start}, at a learning rate of {arm['lr']:g}; the weights are "
        f"those after step {arm['best_step']}, where the validation NLL was lowest. Made by mashup-learning {__version__}."
    )


def _metric_table(summary: Json) -> str:
    found = measures(summary)
    rows = [[_start(init, arm), *(measured(one, arm.get(one.key)) for one in found)] for init, arm in summary["inits"].items()]
    return table(["Start", *(one.name for one in found)], rows)


def _start(init: str, arm: Json) -> str:
    return f"{init} (stopped after step {step})" if (step := stopped_at(arm)) else init


def _usage_of_model() -> str:
    load = 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # or its id on the Hub'
    return "\n".join(["```python", "from transformers import AutoModelForCausalLM", "", load, "```"])
