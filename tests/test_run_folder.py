"""A run folder says the version of its tables, and refuses what it cannot read."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.errors import InputError
from pipeline.core.tables import VERSION
from pipeline.run_folder import CONFIG, Run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=str(tmp_path), base="org/model", pool="pool", target=TargetConfig(train="train.jsonl"))


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
