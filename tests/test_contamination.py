"""Adapters that were trained on the target's rows: exact and near duplicates, as far as their cards tell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.basemodel import load_tokenizer
from pipeline.contamination import compare_data, overlaps
from pipeline.samples import tokenise_text

LONG = "The quick brown fox jumps over the lazy dog near the river bank, and then it sleeps in the tall grass for a while. "


def row(prompt: str, completion: str = "yes") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def tokenised(tiny_base: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    tokenizer = load_tokenizer(tiny_base)
    return lambda rows: [tokenise_text(json.dumps(one).encode(), tokenizer, 0, 4096) for one in rows]


@pytest.fixture
def splits(tokenised: Callable[..., list[dict[str, Any]]]) -> dict[str, pa.Table]:
    rows = tokenised([row(LONG * 3), row("Another one, of which nobody else has ever heard"), row(LONG * 2 + "What now?")])
    table = pa.table({name: [one[name] for one in rows] for name in ("sample_id", "input_ids")})
    return {"sample": table.slice(0, 2), "test": table.slice(2)}


def test_exact_and_near_duplicates_are_counted_apart(
    splits: dict[str, pa.Table], tokenised: Callable[..., list[dict[str, Any]]]
) -> None:
    theirs = tokenised([row(LONG * 3), row(LONG * 2 + "What then?"), row("Something else altogether, and quite short")])
    assert overlaps("a.jsonl", theirs, splits) == [
        "its card names a.jsonl, which holds 1 of 2 sample rows, and 0 others nearly",
        "its card names a.jsonl, which holds 0 of 1 test rows, and 1 others nearly",
    ]
    assert overlaps("a.jsonl", theirs[2:], splits) == []
    assert overlaps("a.jsonl", [], splits) == []


def test_only_files_of_its_own_folder_are_read(
    splits: dict[str, pa.Table], tiny_base: str, tmp_path: Path, write_jsonl: Any
) -> None:
    folder = tmp_path / "adapter"
    (folder / "data").mkdir(parents=True)
    for file in (folder / "data/rows.jsonl", tmp_path / "outside.jsonl"):
        write_jsonl(file, [row(LONG * 3)])
    (folder / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (folder / "noise.jsonl").write_bytes(b"\xff\n[1]\n{}\n\n" + b"{" * 5000)
    found = lambda *names: compare_data(str(folder), names, tiny_base, "s3://b/train.jsonl", splits)  # noqa: E731
    assert found("data/rows.jsonl")[0] == "its card names rows.jsonl, which holds 1 of 2 sample rows, and 0 others nearly"
    assert found("../outside.jsonl", "link.jsonl", str(tmp_path / "outside.jsonl"), "noise.jsonl", "org/name", "") == []
    assert found("s3://b/train.jsonl") == ["its card names s3://b/train.jsonl, the target's own data set"]
