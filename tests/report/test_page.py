"""The page from run folders in every state: whole, begun, without a mashup, and with ids that would break it."""

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_data import RunData

from pipeline.core.storage import Folder
from pipeline.core.tables import METRIC_ROWS
from pipeline.report.page import CHANGED_ROWS, MAX_TEXT, VISIBLE_ROWS, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """The tags and the text of a page; fails where a tag is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(run: RunData, folder: Path) -> Outline:
    write_report(run.write(folder))
    return Outline((folder / "report.html").read_text())


def test_the_page_is_written_into_the_run(run_data: RunData, tmp_path: Path) -> None:
    assert write_report(run_data.write(tmp_path)) == f"{tmp_path}/report.html"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_whole_run_shows_every_section(run_data: RunData, tmp_path: Path) -> None:
    page = page_of(run_data, tmp_path)
    assert [attributes.get("id") for attributes in page.all("section")] == [
        *("verdict", "curves", "merge", "leaderboard", "set-aside", "samples", "time", "definitions", "config")
    ]
    assert len(list(page.all("svg"))) == 5
    assert "not run yet" not in page.text
    assert "Mashup for medicine/train.jsonl" in page.text
    assert "40 adapters found in the pool; 7 adapters set aside." in page.text
    assert "longer than 1024 tokens" in page.text
    assert "2.13.0+cpu" in page.text


def test_the_page_asks_for_nothing_and_runs_nothing(run_data: RunData, tmp_path: Path) -> None:
    page = page_of(run_data, tmp_path)
    assert not list(page.all("script"))
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", (tmp_path / "report.html").read_text())


def test_a_long_leaderboard_is_folded_and_complete(run_data: RunData, tmp_path: Path) -> None:
    page = page_of(run_data, tmp_path)
    leaderboard = run_data.tables["leaderboard.parquet"]
    assert f"{len(leaderboard) - VISIBLE_ROWS} more places" in page.text
    assert all(f" {name} " in page.text for name in leaderboard["adapter_id"].to_pylist())


def test_the_leaderboard_says_what_it_is_ranked_by(run_data: RunData, tmp_path: Path) -> None:
    assert "could be scored, by its loss on the search samples" in page_of(run_data, tmp_path / "nll").text
    run_data.documents["config.yaml"]["search"]["rank_by"] = "token_accuracy"
    text = page_of(run_data, tmp_path / "accuracy").text
    assert "could be scored, by its token accuracy (of equals by loss) on the search samples" in text


def test_rows_that_got_better_and_worse_are_listed(run_data: RunData, tmp_path: Path, add_metric: Callable[..., None]) -> None:
    """The largest change first; what is as good is counted alone."""
    add_metric("own:f1", [(0.5, 0.75), (0.25, 1.0), (1.0, 0.0), (0.5, 0.5)])
    page = page_of(run_data, tmp_path)
    assert "rows" in [attributes.get("id") for attributes in page.all("section")]
    assert "own:f1 on the test split, base against mashup: 2 rows better, 1 worse, 1 as good." in page.text
    better, worse = page.text.partition("Those that got better")[2].split("Those that got worse")
    assert better.index("What is 1?") < better.index("What is 0?")
    assert "It is 1. base says 1 0.2500 mashup says 1 1.0000" in better
    assert "base says 2 1.0000 mashup says 2 0.0000" in worse
    assert "What is 3?" not in page.text


@pytest.mark.parametrize("column", ["base_score", "mashup_score"])
def test_without_two_starts_no_rows_are_compared(
    run_data: RunData, tmp_path: Path, add_metric: Callable[..., None], column: str
) -> None:
    add_metric("choices")
    rows = run_data.tables["metric_rows.parquet"]
    nothing = pa.nulls(len(rows), pa.float64())
    run_data.tables["metric_rows.parquet"] = rows.set_column(rows.column_names.index(column), column, nothing)
    page = page_of(run_data, tmp_path)
    assert "rows" not in [attributes.get("id") for attributes in page.all("section")]
    assert page.text.count("Accuracy by option likelihood on the test split") == 2


def test_many_changed_rows_are_cut_and_those_shown_are_folded(
    run_data: RunData, tmp_path: Path, add_metric: Callable[..., None]
) -> None:
    add_metric("choices", [(0.0, 1.0)] * (CHANGED_ROWS + 7))
    page = page_of(run_data, tmp_path)
    assert f"{CHANGED_ROWS + 7} rows better" in page.text
    assert f"Those that got better, the first {CHANGED_ROWS}" in page.text
    assert page.text.count("mashup says") == CHANGED_ROWS
    assert f"{CHANGED_ROWS - VISIBLE_ROWS} more rows" in page.text


def test_failures_of_scoring_are_listed_with_those_of_the_index(run_data: RunData, tmp_path: Path) -> None:
    text = page_of(run_data, tmp_path).text
    assert "the engine stopped 2 times while scoring it (last: CUDA error <unknown>)" in text
    assert "use_dora: true is not supported" in text


def test_licences_of_donors_are_listed_and_what_stands_against_them_is_named(run_data: RunData, tmp_path: Path) -> None:
    text = page_of(run_data, tmp_path).text
    assert "To be settled before the mashup is passed on: cc-by-nc-4.0 of " in text
    assert "no licence is declared by" in text


def test_hostile_ids_are_shown_and_not_obeyed(make_run: Callable[..., RunData], tmp_path: Path) -> None:
    page = page_of(make_run(hostile=True), tmp_path)
    assert not list(page.all("script"))
    assert not list(page.all("b"))
    assert "<script>alert(1)</script>" in page.text
    assert "$\\frac{--> &lt;b&gt;" in page.text


def test_no_string_of_the_run_becomes_markup(run_data: RunData, tmp_path: Path) -> None:
    places = ("why", "note", "target", "stage", "detail", "warning", "uri", "license")
    evil = {place: f'"><img src={place} onerror=alert(1)>' for place in places}
    documents, catalogue = run_data.documents, run_data.tables["catalogue.parquet"]
    documents["selection.json"]["why"] = evil["why"]
    documents["selection.json"]["donors"][0] |= {"uri": evil["uri"], "license": evil["license"]}
    documents["summary.json"]["note"] = evil["note"]
    documents["config.yaml"]["target"]["train"] = evil["target"]
    documents["stages.json"][evil["stage"]] = {"seconds": 1.0, "done": False, "key": "", "details": {"x": evil["detail"]}}
    warning = pa.array([evil["warning"]] * len(catalogue))
    run_data.tables["catalogue.parquet"] = catalogue.set_column(catalogue.column_names.index("warning"), "warning", warning)
    page = page_of(run_data, tmp_path)
    assert not list(page.all("img"))
    assert [place for place in places if evil[place] not in page.text] == []


def test_no_answer_becomes_markup_or_fills_the_page(run_data: RunData, tmp_path: Path, add_metric: Callable[..., None]) -> None:
    add_metric("<img>:f", [(0.0, 1.0)])
    evil = "<img src=x onerror=alert(1)>" + "\x1b[31m" + "y" * 1000
    table = run_data.tables["metric_rows.parquet"].to_pylist()[0]
    texts = dict.fromkeys(("prompt", "reference", "base_answer", "mashup_answer"), evil)
    run_data.tables["metric_rows.parquet"] = pa.Table.from_pylist([table | texts], schema=METRIC_ROWS)
    page = page_of(run_data, tmp_path)
    assert not list(page.all("img"))
    assert page.text.count("<img src=x onerror=alert(1)> [31m") == 4
    assert "y" * MAX_TEXT not in page.text


def test_a_run_with_only_a_catalogue_says_what_was_not_run(run_data: RunData, tmp_path: Path) -> None:
    run = RunData({}, {"catalogue.parquet": run_data.tables["catalogue.parquet"]})
    text = page_of(run, tmp_path).text
    assert "No donors have been chosen yet" in text
    for part in ("Training and comparison", "Selection and merge", "Search", "Sampling", "Stages"):
        assert f"{part}: not run yet." in text
    assert "40 adapters found in the pool; 6 adapters set aside." in text


@pytest.mark.parametrize("name", ["selection.json", "stages.json", "leaderboard.parquet"])
def test_what_is_cut_short_counts_as_missing(run_data: RunData, tmp_path: Path, name: str) -> None:
    page_of(run_data, tmp_path)
    (file,) = tmp_path.rglob(name)
    file.write_bytes(file.read_bytes()[:-20])
    assert write_report(Folder.at(file.parent))


@pytest.mark.parametrize("name", ["config.yaml", "samples.json", "selection.json", "stages.json", "summary.json"])
def test_any_document_may_be_missing(run_data: RunData, tmp_path: Path, name: str) -> None:
    del run_data.documents[name]
    assert page_of(run_data, tmp_path).text


@pytest.mark.parametrize("name", ["catalogue.parquet", "leaderboard.parquet", "comparison.parquet"])
def test_any_table_may_be_missing_or_empty(run_data: RunData, tmp_path: Path, name: str) -> None:
    run_data.tables[name] = run_data.tables[name].slice(0, 0)
    assert page_of(run_data, tmp_path / "empty").text
    del run_data.tables[name]
    assert page_of(run_data, tmp_path / "missing").text


def test_a_table_of_another_shape_is_named(run_data: RunData, tmp_path: Path) -> None:
    run_data.tables["leaderboard.parquet"] = run_data.tables["leaderboard.parquet"].drop_columns(["stderr"])
    with pytest.raises(ValueError, match=r"leaderboard\.parquet: column 'stderr' is missing"):
        write_report(run_data.write(tmp_path))


def test_a_run_that_starts_from_the_base(run_data: RunData, tmp_path: Path, lose_mashup: Callable[..., None]) -> None:
    lose_mashup(run_data.documents["summary.json"])
    why = "none of 33 scored donors beats the base on the search and on the hold-out samples"
    nobody: dict[str, Any] = {"recipe": None, "donors": [], "candidates": [], "base_holdout_nll": None}
    run_data.documents["selection.json"] = {"verdict": "base", "why": why, **nobody}
    text = page_of(run_data, tmp_path).text
    assert "Start from the base: no donor beats the base." in text
    assert f"Nothing: {why}." in text
    assert "Steps to parity not reached" not in text


def test_parity_not_reached_is_a_headline(run_data: RunData, tmp_path: Path, lose_parity: Callable[..., None]) -> None:
    lose_parity(run_data.documents["summary.json"])
    text = page_of(run_data, tmp_path).text
    assert "does not reach the base's final validation loss within 100 steps" in text
    assert "Steps to parity not reached in 100 steps (each seed alone: 88.2, not)" in text


def test_a_hedge_marks_the_arms_that_it_stopped(run_data: RunData, tmp_path: Path, hedged: Callable[..., dict[str, Any]]) -> None:
    hedged("base")
    page = page_of(run_data, tmp_path)
    assert "The base was stopped" not in page.text
    assert "mashup of 3 donors went on to the end; the base was stopped after 33 of 100 steps" in page.text
    arms = 4  # two rates, two seeds
    assert (tmp_path / "report.html").read_text().count('<em>stopped</em></td><td class="n">') == arms
    assert "Base and mashup were trained to a third of the steps" in page.text
    assert "not reached" not in page.text


def test_what_was_estimated_stands_beside_the_truth(run_data: RunData, tmp_path: Path) -> None:
    assert "What was estimated before" not in page_of(run_data, tmp_path / "without").text
    seconds = {
        "search": {"estimated": 100.0, "true": 338.0, "ratio": 3.38},
        "total": {"estimated": None, "true": 9.0, "ratio": None},
    }
    samples = {"estimated": 1632, "true": 816, "ratio": 0.5}
    run_data.documents["summary.json"]["estimate"] = {"seconds": seconds, "adapter_samples": samples}
    text = page_of(run_data, tmp_path / "with").text
    assert "search 1 min 40 s 5 min 38 s x 3.38" in text
    assert "total – 9.0 s –" in text
    assert "adapter-samples, at most 1,632 816 x 0.50" in text


def test_the_size_of_training_passes_stands_on_the_page(run_data: RunData, tmp_path: Path) -> None:
    run_data.documents["summary.json"]["inits"]["base"]["tokens_per_pass"] = {"arm": [8192]}
    write_report(run_data.write(tmp_path))
    assert "Padded tokens in a training pass: 8,192." in (tmp_path / "report.html").read_text()


def test_a_diverged_arm_is_named(run_data: RunData, tmp_path: Path) -> None:
    run_data.documents["summary.json"]["inits"]["base"]["diverged"] = {"base-lr0.01-seed0": 7}
    assert "base-lr0.01-seed0, started from base, was stopped at step 7" in page_of(run_data, tmp_path).text
