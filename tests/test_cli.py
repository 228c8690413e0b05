"""The command line: complete help, and for each bad input one clear line, exit code 2, and nothing half-written."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import __version__
from pipeline.cli import main
from pipeline.core.storage import Folder
from pipeline.core.tables import VERSION
from pipeline.refresh.history import History
from pipeline.refresh.refresh import load_refresh, look


@pytest.fixture
def config(tiny_base: str, make_adapter: Any, write_jsonl: Any, tmp_path: Path) -> dict[str, Any]:
    make_adapter(tmp_path / "pool/one", tiny_base)
    rows = [{"prompt": f"Add {n} and 1.", "completion": str(n + 1)} for n in range(30)]
    return {
        "run": str(tmp_path / "run"),
        "base": tiny_base,
        "pool": str(tmp_path / "pool"),
        "target": {"train": write_jsonl(tmp_path / "train.jsonl", rows)},
        "search": {"samples": 8, "engine": "transformers"},
    }


@pytest.fixture
def mashup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    # Ray's log handlers keep the standard error of the test that started Ray, which is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr("pipeline.run.begin_early", lambda *given: None)  # no engine is come to

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mashup", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def write(config: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


def assert_one_clear_line(found: tuple[int, str], *parts: str) -> None:
    code, error = found
    message = [line for line in error.strip().splitlines() if line.startswith("mashup: ")]
    assert code == 2, error
    assert len(message) == 1, error
    assert all(part in message[0] for part in parts), message[0]
    assert "Traceback" not in error


def test_missing_config_file(mashup: Any, tmp_path: Path) -> None:
    assert_one_clear_line(mashup("run", str(tmp_path / "none.yaml")), "none.yaml", "cannot read")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: [", ["not valid YAML"]),
        ("just a text", ["expected keys"]),
        ("run: r\nbase: b\npool: p\n", ["'target' is missing"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\nserch: {}\n", ["unknown key 'serch'", "search"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\nsearch: {sampels: 3}\n", ["unknown key 'search.sampels'", "samples"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\ntrain: {steps: -1}\n", ["train.steps", "-1"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\ntrain: {learning_rates: [0]}\n", ["must be positive"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\nmerge: {k: none}\n", ["merge.k", "none"]),
        ("run: r\nbase: b\npool: p\ntarget: {train: t}\nsearch: {engine: fast}\n", ["search.engine", "fast"]),
    ],
)
def test_bad_config(mashup: Any, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert_one_clear_line(mashup("run", str(tmp_path / "c.yaml")), "c.yaml", *parts)


def test_missing_pool(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    config["pool"] = str(tmp_path / "nowhere")
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "nowhere", "no such adapter pool")


def test_empty_pool(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config["pool"] = str(tmp_path / "empty")
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "empty", "no adapter found")


@pytest.mark.usefixtures("ray_session")
def test_pool_without_a_valid_adapter(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pool/one/adapter_model.safetensors").write_bytes(b"\x00" * 20)
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "none of its 1 adapters is valid", "corrupt weights")
    assert not (tmp_path / "run/catalogue.parquet").exists()


def test_unknown_base(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    config["base"] = str(tmp_path / "no-model")
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "no-model", "no such folder")


def test_unknown_base_on_the_hub(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    config["base"] = "nobody/no-such-model"
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "nobody/no-such-model", "unknown base model")


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        ("", ["empty"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["line 2", "malformed JSON"]),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', ["line 2", "not a JSON object"]),
        ('{"prompt": "a", "completion": ""}\n' * 20, ["no row can be used", "20 x empty completion"]),
        ('{"text": "a"}\n' * 20, ["no row can be used", "nothing comes before its completion"]),
    ],
)
def test_bad_target(mashup: Any, config: dict[str, Any], tmp_path: Path, content: str | None, parts: list[str]) -> None:
    (tmp_path / "train.jsonl").unlink()
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "train.jsonl", *parts)
    assert not (tmp_path / "run/samples.parquet").exists()
    assert not (tmp_path / "run/data").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_no_write_permission(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    """A file stands where the run folder should be: root, too, cannot write there."""
    (tmp_path / "file").write_text("")
    config["run"] = str(tmp_path / "file/run")
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "file/run", "cannot write here")


def test_a_store_that_cannot_be_written_is_said_first(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config["search"]["store"] = str(tmp_path / "file/store")
    assert_one_clear_line(mashup("run", write(config, tmp_path)), "file/store", "cannot write here")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["merge", "train", "compare", "report"])
def test_a_stage_without_a_run(mashup: Any, command: str, tmp_path: Path) -> None:
    assert_one_clear_line(mashup(command, "--run", str(tmp_path / "none")), "no run here", "mashup search")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("command", "missing"), [("merge", "mashup search"), ("train", "mashup merge"), ("compare", "mashup merge")]
)
def test_a_stage_before_the_one_it_needs(mashup: Any, config: dict[str, Any], command: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | {"tables": VERSION}))
    assert_one_clear_line(mashup(command, "--run", str(tmp_path / "run")), "is not there yet", missing)


def test_a_refresh_with_wrong_input_or_nothing_to_do(mashup: Any, tiny_base: str, tmp_path: Path) -> None:
    file = tmp_path / "refresh.yaml"
    assert_one_clear_line(mashup("refresh", str(file)), "refresh.yaml", "cannot read")
    content = {"home": str(tmp_path / "home"), "base": tiny_base, "pool": str(tmp_path), "targets": {"law": {"train": "x"}}}
    file.write_text(yaml.safe_dump(content))
    assert_one_clear_line(mashup("refresh", str(file)), "pool: home", "lies in the pool")
    file.write_text(yaml.safe_dump(content | {"pool": str(tmp_path / "pool")}))
    seen = look(load_refresh(str(file)))["law"]
    row = {"time": datetime.now(UTC), "target": "law", "changed": [], "seen": seen, "outcome": "kept"}
    History.of(Folder.at(content["home"])).add(row)
    assert mashup("refresh", str(file))[0] == 0
    assert mashup("refresh", str(file), "--exit-code")[0] == 3
    assert_one_clear_line(mashup("refresh", str(file), "--set", "threshold=-1"), "threshold: ", "-1")


def test_unknown_option_and_missing_option_exit_with_2(mashup: Any) -> None:
    assert mashup("merge", "--fast")[0] == 2
    assert mashup("index", "--base", "x")[0] == 2


def test_an_error_while_working_is_one_line_and_exit_code_1(mashup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("pipeline.config.load_config", broken)
    code, error = mashup("run", str(tmp_path / "c.yaml"))
    assert code == 1
    assert "the disk is full" in error
    assert "Traceback" not in error


def test_settings_take_the_place_of_the_configs(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    file = write(config, tmp_path)
    for setting, part in {
        "train.stepz=3": "unknown key 'train.stepz'",
        "train.steps=0": "train.steps: ",
        "train.steps": "--set train.steps: must be KEY=VALUE",
        "train=[": "--set train=[: not valid YAML",
        "pool=/nothing/here": "/nothing/here: no such adapter pool",
    }.items():
        assert_one_clear_line(mashup("run", file, "--set", setting), part)
    assert_one_clear_line(mashup("run", file, "--until", "report"), "--until report: must be merge")


def test_a_new_config_is_written_once_and_shown(mashup: Any, config: dict[str, Any], tmp_path: Path) -> None:
    file = str(tmp_path / "new.yaml")
    asked = ("--base", config["base"], "--pool", config["pool"], "--target", config["target"]["train"], file)
    assert mashup("init", *asked)[0] == 0
    assert_one_clear_line(mashup("init", *asked), "new.yaml: this file is there already")
    assert mashup("samples", file, "--show", "2", "--set", "target.turns=last")[0] == 0


def called(*arguments: str) -> str:
    """What the command prints, in a process of its own."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_version_and_the_schema_are_printed() -> None:
    assert called("--version") == f"mashup {__version__}\n"
    assert "target" in json.loads(called("schema"))["required"]


@pytest.mark.timeout(60)
def test_help_is_asked_for_in_short_too() -> None:
    assert called("-h") == called("--help")
    assert called("run", "-h") == called("run", "--help")


@pytest.mark.timeout(60)
def test_the_shell_completes_commands_and_options() -> None:
    """As `mashup --install-completion` has it ask."""
    command = str(Path(sys.executable).with_name("mashup"))
    for words, found in {"mashup re": ["report", "refresh"], "mashup run --u": ["--until"]}.items():
        asked = {"_MASHUP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == found


def test_a_mistake_in_a_config_is_said_before_torch_and_ray_are_imported(config: dict[str, Any], tmp_path: Path) -> None:
    file = write({**config, "trian": {}}, tmp_path)
    script = (
        "import sys\nfrom pipeline.cli import main\nsys.argv = ['mashup', 'run', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, {'torch', 'ray'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, timeout=60, check=True)
    assert "unknown key 'trian'" in found.stderr
    assert found.stdout == "2 set()\n"


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_up_to_the_merge_nothing_is_trained(
    mashup: Any,
    config: dict[str, Any],
    write_pool: Callable[[Path], Path],
    word_rows: list[Any],
    write_jsonl: Any,
    tmp_path: Path,
) -> None:
    config |= {
        "pool": str(write_pool(tmp_path / "donors")),
        "target": {"train": write_jsonl(tmp_path / "words.jsonl", word_rows)},
    }
    config["search"] |= {"dtype": "float32", "cpus_per_actor": 1}
    assert mashup("run", write(config, tmp_path), "--until", "merge")[0] == 0
    run = tmp_path / "run"
    assert (run / "mashup/adapter_model.safetensors").exists()
    assert (run / "report.html").exists()
    assert not (run / "train").exists()
    assert not (run / "summary.json").exists()
    found = json.loads(called("show", str(run), "--json"))
    assert found["selection"]["verdict"] == "mashup"
    assert found["stages"]["merge"]["done"]
    assert f"Start from {run}/mashup" in called("show", str(run)).replace("\n", "")


def test_help_names_every_command_and_option_as_installed() -> None:
    """The installed command, as a user calls it."""
    found = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for command in ("init", "index", "search", "merge", "train", "compare", "report", "run", "submit"):
        assert command in found.stdout
        page = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", command, "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "--run" in page.stdout
