"""Adapters that were trained on the target's rows: exact and near duplicates, as far as their cards tell."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from store_server import StoreServer

from pipeline.core.storage import Folder
from pipeline.data.tokenise import Reading, tokenise_text
from pipeline.model.base_model import load_tokenizer
from pipeline.search import contamination
from pipeline.search.contamination import MAX_BYTES, Ours, compare_data, find_contamination, overlaps

LONG = "The quick brown fox jumps over the lazy dog near the river bank, and then it sleeps in the tall grass for a while. "


def row(prompt: str, completion: str = "yes") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def tokenised(tiny_base: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    tokenizer = load_tokenizer(tiny_base)
    return lambda rows: [tokenise_text(json.dumps(one).encode(), tokenizer, 0, Reading(4096)) for one in rows]


@pytest.fixture
def good_adapter(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], write_jsonl: Any) -> Path:
    """One that has the target's rows beside it."""
    folder = make_adapter(tmp_path / "adapter", tiny_base)
    write_jsonl(folder / "rows.jsonl", [row(LONG * 3)])
    return folder


@pytest.fixture
def splits(tokenised: Callable[..., list[dict[str, Any]]]) -> dict[str, pa.Table]:
    rows = tokenised([row(LONG * 3), row("Another one, of which nobody else has ever heard"), row(LONG * 2 + "What now?")])
    table = pa.table({name: [one[name] for one in rows] for name in ("sample_id", "input_ids")})
    return {"sample": table.slice(0, 2), "test": table.slice(2)}


def test_exact_and_near_duplicates_are_counted_apart(
    splits: dict[str, pa.Table], tokenised: Callable[..., list[dict[str, Any]]]
) -> None:
    theirs = tokenised([row(LONG * 3), row(LONG * 2 + "What then?"), row("Something else altogether, and quite short")])
    ours = Ours.of(splits)
    assert overlaps("a.jsonl", theirs, ours) == [
        "its card names a.jsonl, which holds 1 of 2 sample rows, and 0 others nearly",
        "its card names a.jsonl, which holds 0 of 1 test rows, and 1 others nearly",
    ]
    assert overlaps("a.jsonl", theirs[2:], ours) == []
    assert overlaps("a.jsonl", [], ours) == []


def test_near_is_a_matter_of_all_their_tokens_though_only_ours_are_kept(tokenised: Callable[..., list[dict[str, Any]]]) -> None:
    """Against the definition, row by row."""
    ends = ["", "x", *(" ".join(f"river {n} dog" for n in range(number)) for number in (1, 4, 8, 16))]
    rows = tokenised([row(LONG * 2 + end) for end in ends])
    for one in rows:
        ours = Ours.of({"test": pa.table({name: [one[name]] for name in ("sample_id", "input_ids")})})
        for other in rows:
            mine, its = (contamination._shingles(each["input_ids"]) for each in (one, other))
            near = len(mine & its) >= contamination.NEAR * len(mine | its)
            assert bool(overlaps("a.jsonl", [other] * 2, ours)) == near


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


def test_a_file_is_read_once_however_it_is_spelled_and_a_hub_id_has_no_case(
    splits: dict[str, pa.Table], tiny_base: str, tmp_path: Path, write_jsonl: Any
) -> None:
    for name in ("d.jsonl", "E.JSONL", "f.json"):
        write_jsonl(tmp_path / name, [row(LONG * 3)])
    (tmp_path / "g.parquet").write_bytes(b"")
    found = lambda *names: compare_data(str(tmp_path), names, tiny_base, "Org/Name", splits)  # noqa: E731
    once = found("d.jsonl")
    assert once[0] == "its card names d.jsonl, which holds 1 of 2 sample rows, and 0 others nearly"
    assert found("d.jsonl", "./d.jsonl", ".//d.jsonl", "x/../d.jsonl", "d.jsonl/") == once
    for name in ("E.JSONL", "f.json"):
        assert found(name) == [sentence.replace("d.jsonl", name) for sentence in once]
    assert found("g.parquet", "é" * 200) == ["its card names g.parquet, which is Parquet and not looked at"]
    assert found("org/name", "org/name") == ["its card names org/name, the target's own data set"]
    assert found("a/Org/Name", "name") == []


def test_of_long_files_and_lines_not_all_is_read(
    splits: dict[str, pa.Table], tiny_base: str, tmp_path: Path, write_jsonl: Any
) -> None:
    for name, size in (("a.jsonl", MAX_BYTES - 10_000), ("b.jsonl", 20_000)):
        write_jsonl(tmp_path / name, [row("x" * size), row(LONG * 3)])
    (tmp_path / "b.jsonl").open("a").write("\n" * 20_000)
    first, *_, last = compare_data(str(tmp_path), ["a.jsonl", "b.jsonl"], tiny_base, "t", splits)
    assert first == "its card names a.jsonl, which holds 1 of 2 sample rows, and 0 others nearly"
    assert re.fullmatch(r"its card names b.jsonl, of which 3\d{4} bytes are not looked at; 4 MB of an adapter's data are", last)


def test_of_an_adapter_of_an_object_store_the_names_alone_are_compared(
    splits: dict[str, pa.Table], tiny_base: str, good_adapter: Path, bucket: str, store_server: StoreServer
) -> None:
    """Neither its data nor its weights are asked for."""
    Folder.at(f"{bucket}/pool").upload(good_adapter, "a")
    store_server.requests.clear()
    found = compare_data(f"{bucket}/pool/a", ["rows.jsonl", "org/name"], tiny_base, "Org/Name", splits)
    assert found == ["its card names org/name, the target's own data set"]
    assert compare_data("hf://org/none", ["rows.jsonl"], tiny_base, "Org/Name", splits) == []
    assert store_server.requests == []


@pytest.mark.usefixtures("ray_session")
def test_an_adapter_whose_data_fails_sets_nothing_back(
    splits: dict[str, pa.Table], tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(uri: str, *_: Any) -> list[str]:
        if uri == "dies":
            os._exit(1)
        return [uri] if uri == "well" else [1 / 0]

    monkeypatch.setattr(contamination, "compare_data", compare)
    names = ["dies", "fails", "well"]
    found = find_contamination(pa.table({"adapter_id": names, "uri": names, "datasets": [["d"]] * 3}), tiny_base, "t", splits)
    assert found["well"] == ["well"]
    for name in ("dies", "fails"):
        assert len(found[name]) == 1
        assert found[name][0].startswith("its data cannot be compared with the target's rows (")
