"""Put the mashup of a run, or its finetuned weights, on the Hugging Face Hub.

The card is the run's, and the config of an adapter names the base as the Hub knows it: a path of this machine is of no use there.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.core.base_ref import name_of
from pipeline.core.errors import InputError
from pipeline.core.file_names import CARD_FILE, CONFIG_FILE
from pipeline.core.hub_api import answer
from pipeline.core.node_folder import temporary_folder
from pipeline.report.finetuned_card import finetuned_card
from pipeline.report.model_card import HUB_ID, base_on_hub, model_card
from pipeline.run_folder import Run


def push(run: Run, repo: str, weights: str | None = None, base: str | None = None, private: bool = False) -> str:
    """Upload weights with their card. Returns the URL of the commit.

    Args:
        repo: ORG/NAME; made where it is missing.
        weights: mashup or finetuned; by default the finetuned ones where there are some, else the mashup.
        base: the base's id on the Hub, where the run had a copy of it elsewhere.
        private: of a repository that is made.

    Raises:
        InputError: the run has no such weights, the base's id is not known, or the Hub refuses the upload.
        HubBusyError: the Hub does not answer.
    """
    chosen = weights or ("finetuned" if run.folder.exists("finetuned") else "mashup")
    run.needs("compare" if chosen == "finetuned" else "merge", f"{chosen}/", "mashup run")
    if not run.folder.exists(chosen):
        raise InputError(f"{run.folder.uri}: it has no {chosen}/; where the selection chose the base, there is no mashup")
    selection = run.folder.read_json("selection.json")
    named = base or base_on_hub(run.config.base, selection["donors"])
    if not HUB_ID.fullmatch(named):
        raise InputError(f"{name_of(run.config.base)}: its id on the Hub is not known; give it, as in --base ORG/NAME")
    with temporary_folder() as scratch:
        source = run.folder.sub(chosen)
        source.download(source.list_files(), scratch)
        (scratch / CARD_FILE).write_text(_card(run, chosen, selection, named))
        _name_base(scratch / CONFIG_FILE, named)
        answer(repo, lambda api: api.create_repo(repo, private=private, exist_ok=True), "write there")
        said = f"{chosen} by mashup-learning"
        send = lambda api: str(api.upload_folder(repo_id=repo, folder_path=scratch, commit_message=said))  # noqa: E731
        return answer(repo, send, "write there")


def _card(run: Run, weights: str, selection: dict[str, Any], base: str) -> str:
    config = run.config.model_copy(update={"base": base})
    if weights == "finetuned":
        return finetuned_card(run.folder.read_json("summary.json"), selection, config)
    return model_card(selection, config, run.folder.read_json("samples.json"))


def _name_base(file: Path, base: str) -> None:
    """Name the base in an adapter's config; a whole model has none."""
    if file.exists():
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2) + "\n")
