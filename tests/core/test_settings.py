"""Config files that are none, or that hold what no message should show whole."""

from pathlib import Path

import pytest

from pipeline.config import build_config, load_config
from pipeline.core.errors import InputError
from pipeline.core.settings import MAX_BYTES


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
        pytest.param(b"run: " + b"[" * 5000, "not valid YAML", id="endless nesting"),
        (b"run: " + b"9" * 5000, "not valid YAML"),
        (b"# \n" * (MAX_BYTES // 2), "a config file has 1048576 bytes at most"),
        (b"run: !!int ''", "not valid YAML"),
        (b"run: !!bool abc", "not valid YAML"),
        (b"run: !!timestamp abc", "not valid YAML"),
        (b"run: !!set [a]", "not valid YAML"),
        (b"train: {steps: 0100}", "0100 is another number in YAML"),
        (b"train: {steps: 1:30}", "1:30 is another number in YAML"),
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


def test_of_many_problems_the_first_are_told(tmp_path: Path) -> None:
    lines = [f"key{number}: 1" for number in range(1000)]
    (tmp_path / "c.yaml").write_text("\n".join(["run: r", "base: b", "pool: p", "target: {train: t}", *lines]))
    with pytest.raises(InputError, match=r"unknown key .key0.*and 995 more") as refusal:
        load_config(str(tmp_path / "c.yaml"))
    assert len(str(refusal.value)) < 1500


def test_mappings_that_merge_one_another_again_and_again_are_refused_soon(tmp_path: Path) -> None:
    """Ten lines of them are nine to the tenth power keys."""
    lines = ["a0: &a0 {" + ", ".join(f"k{number}: 1" for number in range(9)) + "}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}x: 1}}" for n in range(1, 11)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"more than 10000 keys by merges|unknown key 'a0'"):  # newer YAMLs merge each key once
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search: {actors: many}", "search.actors: must be a number or auto, got 'many'$"),
        ("exclude: sums-*", "exclude: must be a list, got 'sums-.'$"),
        ("exclude: ['s3://KEY:SECRET@bucket']", "exclude: a location must hold no credentials"),
        ("int: 1", "unknown key 'int'"),
        ("search:", "search: must be a section of keys, got None$"),
        ("pool: 2024-01-01", "pool: must be a text; put it in quotes, got"),
        ('"a\\nb": 1', r"unknown key 'a.+nb'"),
    ],
)
def test_words_for_what_is_often_wrong(line: str, message: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    lines = [one for one in ("run: r", "base: b", "pool: p", "target: {train: t}") if not one.startswith(f"{key}:")]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, line]))
    with pytest.raises(InputError, match=message) as refusal:
        load_config(str(tmp_path / "c.yaml"))
    assert str(refusal.value).isprintable()
    assert "SECRET" not in str(refusal.value)


def test_a_key_of_the_last_version_is_passed_over_and_this_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"run": "r", "base": "b", "pool": "p", "target": {"train": "t"}, "search": {"screen": 0.5, "seed": 3}}
    config = build_config(asked, "test")
    assert "screen" not in config.model_dump()["search"]
    assert config.search.seed == 3
    assert "mashup: config key 'screen' is passed over: " in capsys.readouterr().err
