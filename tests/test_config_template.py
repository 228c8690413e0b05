"""`mashup init` writes a file that is a config as it is, and as it is with every comment taken away."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, build_config
from pipeline.config_template import template


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    names = {name: str(tmp_path / name) for name in ("run", "base", "pool")}
    return {**names, "target": {"train": str(tmp_path / "a # b: 'c'.jsonl")}}


def test_what_is_given_is_asked_and_the_rest_has_its_defaults(given: dict[str, Any]) -> None:
    assert build_config(yaml.safe_load(template(given)), "test") == build_config(given, "test")


def test_every_key_is_there_with_its_default(given: dict[str, Any]) -> None:
    bare = re.sub(r"(?m)^( *)# (\w+:)", r"\1\2", template(given).partition("\n")[2])
    content = yaml.safe_load(bare)
    assert content.keys() == Config.model_fields.keys()
    assert build_config(content, "test") == build_config(given, "test")
