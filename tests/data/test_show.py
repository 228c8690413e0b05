"""What a person sees of the first rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hub import COMMIT, this_process_asks

from pipeline.config import CompareConfig, Config
from pipeline.core.errors import InputError
from pipeline.data.show import LEARNED, MARKS, show_rows

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(5)]


def learned(text: object) -> list[str]:
    """The parts that are in colour."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNED]  # type: ignore[attr-defined]


def test_rows_are_shown_with_what_is_learned_in_colour(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    bad = [{"label": 3}, {"prompt": "\u001b[31mred", "completion": "blue"}]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, [*ROWS[:1], *bad])) + "\nnot JSON\n")
    first, second, third, fourth = show_rows(config_for(tmp_path / "t.jsonl"), 9)
    assert learned(first) == ["It is 0."]
    assert "What is 0?" in first.plain
    assert re.match(r"row 1: \d+ tokens, \d+ of them learned, ends of turns included\n", first.plain)
    assert second.plain.startswith("row 2: passed over: of no known form: it has label")
    assert "\u001b" not in third.plain
    assert fourth.plain.startswith("row 4: passed over: malformed")


def test_what_is_learned_is_also_seen_without_colours(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(ROWS[0]))
    [shown] = show_rows(config_for(tmp_path / "t.jsonl"), 1, MARKS)
    assert learned(shown) == ["[[It is 0.]]"]


def test_choices_are_counted_where_they_are_asked_for(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    rows = [{**ROWS[0], "choices": ["It is 0.", "It is 1.", "It is 2."]}, ROWS[1]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_for(tmp_path / "t.jsonl")
    first, second = show_rows(config.model_copy(update={"compare": CompareConfig(metric="choices")}), 2)
    assert "ends of turns included; 3 choices\n" in first.plain
    assert "ends of turns included; without a list of two choices" in second.plain
    assert "choices" not in "".join(row.plain for row in show_rows(config, 2))


def write_form(path: Path, rows: list[dict[str, str]]) -> None:
    """Write prompts and completions as Parquet, CSV or a saved data set, by the path's ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    else:
        Dataset.from_list(rows).save_to_disk(path)


@pytest.mark.parametrize("form", ["t.parquet", "t.csv", "saved"])
def test_every_form_is_shown_without_ray(form: str, tmp_path: Path, config_for: Callable[..., Config]) -> None:
    write_form(tmp_path / form, ROWS)
    assert [learned(row) for row in show_rows(config_for(tmp_path / form), 2)] == [["It is 0."], ["It is 1."]]


@pytest.mark.parametrize("form", ["t.parquet", "t.csv", "saved"])
def test_as_many_rows_are_shown_as_are_asked_for(form: str, tmp_path: Path, config_for: Callable[..., Config]) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(260)]
    write_form(tmp_path / form, rows)
    shown = list(show_rows(config_for(tmp_path / form), 250))
    assert [learned(row) for row in shown] == [[f"It is {n}."] for n in range(250)]


def test_a_harmed_file_is_an_input_error(tmp_path: Path, config_for: Callable[..., Config]) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"t\.parquet: cannot be read"):
        list(show_rows(config_for(tmp_path / "t.parquet"), 1))


@pytest.mark.parametrize("asked", ["?split=train_sft", f"@{COMMIT}?split=train_sft"])
def test_a_data_set_of_the_hub_is_shown_by_its_bare_id(asked: str, config_for: Callable[..., Config]) -> None:
    files = {name: json.dumps(row).encode() for name, row in zip(("train_sft.jsonl", "train_gen.jsonl"), ROWS, strict=False)}
    with this_process_asks({"datasets/org/talk": files}):
        [shown] = show_rows(config_for(f"org/talk{asked}"), 9)
    assert learned(shown) == ["It is 0."]
