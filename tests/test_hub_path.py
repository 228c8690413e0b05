"""From a pool on the Hub and a file of conversations to an adapter on the Hub, in the five commands of docs/hub.md."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub import COMMIT, serve_hub
from peft import PeftConfig

from pipeline.core.file_names import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

SMALL = ["search.samples=24", "search.engine=transformers", "search.cpus_per_actor=1", "search.actors=1"]
SHORT = [
    "target.test=me/held",
    "train.steps=6",
    "train.batch_size=8",
    "train.learning_rates=[5e-3]",
    "train.evaluations=3",
]


def repository(folder: Path, card: str = "") -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return files | ({CARD_FILE: card.encode()} if card else {})


@pytest.mark.long
@pytest.mark.timeout(600)
def test_five_commands_lead_from_a_pool_on_the_hub_to_an_adapter_there(
    tiny_base: str, write_pool: Callable[[Path], Path], word_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pool = write_pool(tmp_path / "pool")
    card = "---\nbase_model: org/base\nlicense: mit\n---\n"
    donors = {
        f"org/{kind}-{seed}": repository(pool / kind / str(seed), card) for kind in ("related", "random") for seed in (1, 2)
    }
    held = "\n".join(map(json.dumps, word_rows[:12])).encode()
    repos = {"org/base": repository(Path(tiny_base)), "datasets/me/held": {"test.jsonl": held}, **donors}
    talk = [
        {"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]}
        for row in word_rows[12:]
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    sets = [word for setting in (*SMALL, *SHORT) for word in ("--set", setting)]
    commands = [
        ["init", "--base", "org/base", "--pool", "hf://?base=org/base&limit=3", "--target", "talk.jsonl"],
        ["samples", "config.yaml"],
        ["run", "config.yaml", *sets],
        ["show", "run"],
        ["push", "run", "--to", "me/new"],
    ]
    said = []
    with serve_hub(repos, downloads={"org/random-2": 9, "org/related-2": 8, "org/related-1": 7}) as (endpoint, asked):
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
        for command in commands:
            line = [sys.executable, "-m", "pipeline.cli", *command]
            done = subprocess.run(line, env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            said.append(done.stdout)
    catalogue = pq.read_table(tmp_path / "run/catalogue.parquet").to_pylist()
    assert {row["uri"]: row["downloads"] for row in catalogue} == {
        f"hf://org/random-2@{COMMIT}": 9,
        f"hf://org/related-2@{COMMIT}": 8,
        f"hf://org/related-1@{COMMIT}": 7,
    }
    assert {(row["status"], row["license"]) for row in catalogue} == {("ok", "mit")}
    assert asked.count(WEIGHTS_FILE) == 3  # once each, from the check to the merge
    assert "me/new/commit" in said[-1]
    assert json.loads(repos["me/new"][CONFIG_FILE])["base_model_name_or_path"] == "org/base"
    assert repos["me/new"][WEIGHTS_FILE] == (tmp_path / "run/finetuned" / WEIGHTS_FILE).read_bytes()
    (tmp_path / "back").mkdir()
    for name, content in repos["me/new"].items():
        (tmp_path / "back" / name).write_bytes(content)
    assert PeftConfig.from_pretrained(str(tmp_path / "back")).base_model_name_or_path == "org/base"
