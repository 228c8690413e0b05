"""A run folder says the version of its tables, refuses what it cannot read, and has one driver at a time."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.errors import InputError
from pipeline.core.lock import LockLostError, LockTakenError
from pipeline.core.tables import VERSION
from pipeline.run import run_search
from pipeline.run_folder import CONFIG, LOCK, Run

DRIVER = """
import sys, time
from pipeline.run_folder import Run

with Run.open(sys.argv[1]).locked() as run:
    run.ledger.note("ray", 1.0)
    print("at work", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=str(tmp_path), base="/models/base", pool="pool", target=TargetConfig(train="train.jsonl"))


def test_a_run_is_opened_by_the_version_that_made_it(config: Config) -> None:
    Run(config).save_config()
    assert yaml.safe_load((Path(config.run) / CONFIG).read_text())["tables"] == VERSION
    assert Run.open(config.run).config == config


@pytest.mark.parametrize("found", [VERSION + 1, "two", None])
def test_tables_of_a_version_that_is_not_known_are_refused_and_left_alone(found: object, config: Config) -> None:
    Run(config).save_config()
    file = Path(config.run) / CONFIG
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"tables": found}))
    before = file.read_text()
    with pytest.raises(InputError, match=r"its config\.yaml says tables of version"):
        Run.open(config.run)
    with pytest.raises(InputError, match="update it, or choose another run folder"):
        Run(config).save_config()
    assert file.read_text() == before


def test_the_folder_of_a_config_file_is_no_run(config: Config) -> None:
    """`mashup show .`, where `mashup init` wrote the config."""
    (Path(config.run) / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(InputError, match=r"no run here \(its config\.yaml is yours\); give the folder that the config names"):
        Run.open(config.run)


def test_a_config_file_is_no_run(config: Config) -> None:
    """`mashup show config.yaml`, as `mashup run` is called."""
    Run(config).save_config()
    with pytest.raises(InputError, match="give the folder of the run, which a config names as run"):
        Run.open(f"{config.run}/{CONFIG}")


def test_older_tables_are_made_anew_by_a_whole_run_and_refused_by_a_single_stage(config: Config) -> None:
    Run(config).save_config()
    file = Path(config.run) / CONFIG
    file.write_text(yaml.safe_dump({name: value for name, value in yaml.safe_load(file.read_text()).items() if name != "tables"}))
    with pytest.raises(InputError, match="its tables are of an older version; `mashup run`"):
        Run.open(config.run)
    Run(config).save_config()
    assert Run.open(config.run).config == config


def test_a_config_file_that_is_cut_short_is_an_input_error(config: Config) -> None:
    (Path(config.run) / CONFIG).write_text('run: "x')
    with pytest.raises(InputError, match="not valid YAML"):
        Run.open(config.run)


@pytest.mark.parametrize("name", ["data/train.jsonl", "config.yaml", "scores/mine.csv"])
def test_a_folder_of_the_users_is_no_run_folder(name: str, config: Config) -> None:
    file = Path(config.run) / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("run: .")
    (Path(config.run) / ".gitkeep").touch()
    with pytest.raises(InputError, match=rf"holds '{name.partition('/')[0]}' and no run; choose a new or an empty one"):
        Run(config).save_config()
    assert file.read_text() == "run: ."


def test_a_store_in_the_run_folder_may_be_there_before(config: Config) -> None:
    inside = config.model_copy(update={"search": SearchConfig(store=f"{config.run}/a/store")})
    Run(inside).folder.write_text("a/store/x", "")
    Run(inside).save_config()


@pytest.mark.parametrize("left", [("config.yaml",), ("stages.json", "data/train.parquet"), (".gitkeep",), ()])
def test_a_run_that_was_begun_or_an_empty_folder_is_one(left: tuple[str, ...], config: Config) -> None:
    Run(config).save_config()
    for file in set(Path(config.run).iterdir()):
        file.unlink() if file.name not in left else None
    for name in left:
        Run(config).folder.write_text(name, "{}") if name != CONFIG else None
    Run(config).save_config()


@pytest.fixture
def driver(config: Config) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in the run folder."""
    Run(config).save_config()
    with subprocess.Popen([sys.executable, "-c", DRIVER, config.run], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def mashup(*arguments: str) -> int:
    """The command, in this process. Gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mashup", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def files(run: str) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(run).rglob("*") if file.is_file()}


COMMANDS = {
    "run": ["CONFIG"],
    "run --plan": ["CONFIG", "--plan"],
    "index": ["--base", "BASE", "--pool", "POOL", "--run", "RUN"],
    "search": ["--base", "BASE", "--pool", "POOL", "--target", "TARGET", "--run", "RUN"],
    "merge": ["--run", "RUN"],
    "compare": ["--run", "RUN"],
    "train": ["--run", "RUN"],
}


def test_a_second_driver_ends_at_once_and_changes_nothing(
    driver: subprocess.Popen[str], config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "CONFIG": f"{tmp_path}.yaml",
        "BASE": "/models/base",
        "POOL": "pool",
        "TARGET": f"{tmp_path}.jsonl",
        "RUN": config.run,
    }
    Path(places["TARGET"]).write_text("{}\n")
    asked = {"run": config.run, "base": "/models/base", "pool": "pool", "target": {"train": places["TARGET"]}}
    Path(places["CONFIG"]).write_text(yaml.safe_dump(asked))
    before = files(config.run)
    for command, words in COMMANDS.items():
        code = mashup(*command.split()[:1], *(places.get(word, word) for word in words))
        error = " ".join(capsys.readouterr().err.split())
        assert code == 1, f"{command}: {error}"
        assert "another process is at work here since " in error, command
        assert f"(process {driver.pid} on {socket.gethostname()}); try again when it has ended, or end it" in error, command
        assert files(config.run) == before, command


def test_a_run_that_is_at_work_may_be_looked_at(driver: subprocess.Popen[str], config: Config) -> None:
    assert mashup("report", "--run", config.run) == 0
    assert driver.poll() is None


def test_a_run_whose_driver_was_killed_is_taken_up_at_once(driver: subprocess.Popen[str], config: Config) -> None:
    driver.kill()
    driver.wait()
    with Run.open(config.run).locked() as run:
        assert run.ledger.seconds("ray") == 1.0
        with pytest.raises(LockTakenError), Run.open(config.run).locked():
            pass


def test_what_is_done_is_read_once_nobody_else_works_there(config: Config) -> None:
    run = Run(config)
    assert not run.ledger.records
    with Run(config).locked() as other:
        other.ledger.note("ray", 1.0)
    with run.locked():
        assert run.ledger.seconds("ray") == 1.0


def test_who_lost_the_folder_puts_nothing_down(config: Config) -> None:
    with Run(config).locked() as run:
        run.check()
        for name in run.folder.sub(LOCK).list_files():
            run.folder.delete(f"{LOCK}/{name}")
        for put_down in (run.check, lambda: run.ledger.note("ray", 1.0)):
            with pytest.raises(LockLostError):
                put_down()
    assert not Run(config).ledger.records


def test_a_folder_of_the_users_gets_no_lock(config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    train = tmp_path.parent / f"{tmp_path.name}.jsonl"
    train.write_text("{}\n")
    with pytest.raises(InputError, match="and no run"):
        run_search(config.model_copy(update={"target": TargetConfig(train=str(train))}))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_the_paths_of_a_run_are_those_of_its_base_by_name(config: Config, bucket: str) -> None:
    pinned = Run(config.model_copy(update={"base": f"{bucket}@state-0123456789abcdef"}))
    assert pinned.shared_paths._read == {}
