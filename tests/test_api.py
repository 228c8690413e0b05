"""The functions for a notebook: what a run left is read by them, and the example of docs/python.md runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipeline import api
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder

EXAMPLE = re.compile(r"```python\n(from pipeline import api\n.*?)```", re.DOTALL)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """What would be run, in place of running it."""
    found = list[tuple[str, Config]]()
    for name in ("run_all", "find_start"):
        monkeypatch.setattr(f"pipeline.run.{name}", lambda config, name=name: found.append((name, config)))
    return found


def test_a_run_is_asked_for_by_a_file_a_dictionary_or_a_config(asked: list[tuple[str, Config]], tmp_path: Path) -> None:
    content = {"run": str(tmp_path / "run"), "base": "org/model", "pool": "pool", "target": {"train": "train.jsonl"}}
    config = Config.model_validate(content)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    for given in (str(file), file, content, config):
        assert api.run(given) == content["run"]
    assert asked == [("run_all", config)] * 4
    api.run(config, until="merge")
    assert asked[-1] == ("find_start", config)
    with pytest.raises(InputError, match="config: unknown key 'pol'"):
        api.run({**content, "pol": "x"})


def test_what_a_run_found_is_read(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for read in (api.leaderboard, api.mashup, api.summary):
        with pytest.raises(InputError, match=r"is not there \(yet\)"):
            read(tmp_path)
    table = pa.table({"adapter_id": ["a"]})
    folder.write_table("leaderboard.parquet", table)
    folder.write_json("summary.json", {"verdict": "mashup"})
    assert api.leaderboard(folder.uri).equals(table)
    assert api.summary(folder.uri) == {"verdict": "mashup"}
    for verdict, found in {"base": None, "mashup": f"{folder.uri}/mashup"}.items():
        folder.write_json("selection.json", {"verdict": verdict})
        assert api.mashup(folder.uri) == found


def test_it_is_quick_to_import() -> None:
    script = "import sys\nimport pipeline.api\nprint({'torch', 'ray', 'transformers', 'matplotlib'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_the_example_of_the_docs_runs(
    tiny_base: str,
    write_pool: Callable[[Path], Path],
    word_rows: list[Any],
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    content = {
        "run": str(tmp_path / "run"),
        "base": tiny_base,
        "pool": str(write_pool(tmp_path / "donors")),
        "target": {"train": write_jsonl(tmp_path / "words.jsonl", word_rows)},
        "search": {"samples": 8, "engine": "transformers", "dtype": "float32", "cpus_per_actor": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (example,) = EXAMPLE.findall((Path(__file__).parents[1] / "docs/python.md").read_text())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["donors"]["adapter_id"].tolist()
    assert names["start"] == str(tmp_path / "run/mashup")
