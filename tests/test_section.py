"""Config files that are none, or that hold what no message should show whole."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.section import MAX_BYTES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- a\n- b\n", "expected keys such as run, base, pool and target, got list"),
        (b"", "got NoneType"),
        (b"1: 2\n", "config.yaml: "),
        (b"run: a\nrun: b\n", "not valid YAML .key 'run' stands there twice"),
        (b"run: a\ntrain: {steps: 1, seeds: [0], steps: 2}\n", "key 'steps' stands there twice"),
        (b"run: " + b"[" * 5000, "not valid YAML"),
        (b"run: " + b"9" * 5000, "not valid YAML"),
        (b"# \n" * (MAX_BYTES // 2), "a config file has 1048576 bytes at most"),
    ],
)
def test_a_file_that_holds_no_keys(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "config.yaml"))


def test_anchors_and_merged_keys_are_read(tmp_path: Path) -> None:
    text = "target: &t {train: a, test_rows: 5}\nrun: r\nbase: b\npool: p\n"
    (tmp_path / "c.yaml").write_text(text.replace("target: &t", "x: &t") + "target: {<<: *t, train: c}\n")
    with pytest.raises(InputError, match=r"^[^;]*unknown key 'x'[^;]*$"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("text", ["x" * 100_000, "&a [*a]", "[" + "[1, 1, 1, 1, 1, 1, 1]," * 9 + "]"])
def test_a_message_is_short_whatever_the_value(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"run: r\nbase: b\npool: p\ntarget: {text}\n")
    with pytest.raises(InputError) as refusal:
        load_config(str(tmp_path / "c.yaml"))
    assert len(str(refusal.value)) < 1000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the config file"):
        load_config(str(tmp_path / "none.yaml"))
