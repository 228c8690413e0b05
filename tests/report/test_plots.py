"""Plots as SVG: well-formed, the same on every run, nothing read from an id, and everything drawn that should be."""

import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hostile import HOSTILE
from run_data import RunData

from pipeline.core.tables import COMPARISON
from pipeline.report import plots

CHOSEN = {"base": 5e-4, "mashup": 5e-4}


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def every_plot(run_data: RunData) -> list[str]:
    comparison, documents = run_data.tables["comparison.parquet"], run_data.documents
    return [
        plots.loss_plot(comparison, CHOSEN, documents["summary.json"]["parity"]),
        plots.accuracy_plot(comparison, CHOSEN),
        plots.leaderboard_plot(run_data.tables["leaderboard.parquet"], {"pool/boolq-r8-seed0"}),
        plots.time_plot(documents["stages.json"]),
        plots.pays_plot(documents["summary.json"]["parity"]),
    ]


def test_a_plot_says_what_it_shows_and_scales(every_plot: list[str]) -> None:
    for svg in every_plot:
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root.get("viewBox", "").startswith(f"0 0 {plots.WIDTH} ")
        assert root.get("width") is None
        assert "<metadata" not in svg


def test_plots_on_one_page_share_no_id(every_plot: list[str]) -> None:
    ids = [name for svg in every_plot for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_plot_is_there(every_plot: list[str]) -> None:
    for svg in every_plot:
        wanted = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', svg))
        assert wanted <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_the_same_table_gives_the_same_plot(run_data: RunData) -> None:
    comparison = run_data.tables["comparison.parquet"]
    assert plots.accuracy_plot(comparison, CHOSEN) == plots.accuracy_plot(comparison, CHOSEN)


def test_colours_follow_the_theme_of_the_page(every_plot: list[str]) -> None:
    assert f"stroke: var(--base, {plots.BASE_COLOUR})" in every_plot[0]
    assert f"stroke: var(--mashup, {plots.MASHUP_COLOUR})" in every_plot[0]


def test_the_loss_plot_names_its_arms_and_parity(every_plot: list[str]) -> None:
    found = texts(every_plot[0])
    assert {"base, lr 5e-4", "mashup, lr 5e-4", "base, lr 1e-4", "the base's final NLL", "parity, step 29.3"} <= set(found)


def test_parity_that_is_not_reached_has_no_marker(
    run_data: RunData, summary: dict[str, Any], lose_parity: Callable[[dict[str, Any]], None]
) -> None:
    lose_parity(summary)
    found = texts(plots.loss_plot(run_data.tables["comparison.parquet"], CHOSEN, summary["parity"]))
    assert "the base's final NLL" in found
    assert not any(text.startswith("parity") for text in found)


def test_a_curve_is_the_mean_over_seeds() -> None:
    rows = [("base", 0, 2.0), ("base", 1, 4.0)]
    found = plots.read_curves(_comparison(rows), "eval_nll")
    assert found == [plots.Curve("base", 1e-4, [0], [3.0], [2.0], [4.0])]


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_curve_that_diverged_has_a_gap(loss: float | None) -> None:
    table = _comparison([("base", 0, 2.0), ("base", 1, loss)])
    assert math.isnan(plots.read_curves(table, "eval_nll")[0].mean[0])
    assert "<svg" in plots.loss_plot(table, {}, None)


def test_an_arm_that_was_not_chosen_does_not_set_the_scale(run_data: RunData) -> None:
    table = run_data.tables["comparison.parquet"]
    rows = [{**row, "eval_nll": 1e6} if row["lr"] == 1e-4 and row["step"] else row for row in table.to_pylist()]
    svg = plots.loss_plot(pa.Table.from_pylist(rows, schema=COMPARISON), CHOSEN, None)
    assert {"0.6", "1.0", "1.6"} <= set(texts(svg))


def test_the_leaderboard_shows_the_first_adapters_without_the_base(run_data: RunData) -> None:
    found = texts(plots.leaderboard_plot(run_data.tables["leaderboard.parquet"], set()))
    assert sum(text.startswith("pool/") for text in found) == plots.TOP
    assert not any(text.startswith("base") for text in found)


def test_ids_are_text_and_nothing_else(make_run: Callable[..., RunData]) -> None:
    svg = plots.leaderboard_plot(make_run(hostile=True).tables["leaderboard.parquet"], set(HOSTILE))
    assert "<script" not in svg
    assert {"<script>alert(1)</script>  1", "a|b`c d  2", "$\\frac{--> &lt;b&gt;  3"} <= set(texts(svg))


def test_an_id_in_another_script_warns_of_no_font(run_data: RunData) -> None:
    table = run_data.tables["leaderboard.parquet"]
    names = ["医疗问答", *table["adapter_id"].to_pylist()[1:]]
    table = table.set_column(table.column_names.index("adapter_id"), "adapter_id", pa.array(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any("医疗问答" in text for text in texts(plots.leaderboard_plot(table, set())))


def test_a_stage_starts_up_no_longer_than_it_took() -> None:
    assert plots.start_up({"seconds": 10.0, "details": {"engine_start_seconds": 25.0}}) == 10.0
    assert plots.start_up({"seconds": 10.0, "details": {"startup_seconds": 4.0}}) == 4.0
    assert plots.start_up({"seconds": 10.0, "details": {}}) == 0.0


def test_the_time_plot_writes_each_stage_and_its_time(every_plot: list[str]) -> None:
    assert {"index", "search", "compare", "8.4 s", "5 min 38 s", "starting up"} <= set(texts(every_plot[3]))


def test_stages_that_are_neither_overhead_nor_training_stand_apart(run_data: RunData) -> None:
    stages = run_data.documents["stages.json"]
    assert "charged to no start" not in texts(plots.time_plot(stages))
    found = texts(plots.time_plot({"calibration": stages["index"], **stages}))
    assert {"overhead: find, score, merge", "train and test", "charged to no start"} <= set(found)
    colours = {name: plots.stage_colour(name) for name in ("ray", "calibration", "index", "merge", "compare")}
    assert colours["ray"] == colours["calibration"] != colours["index"] == colours["merge"] != colours["compare"]


def _comparison(rows: list[tuple[str, int, float | None]]) -> pa.Table:
    values = [{"init": init, "lr": 1e-4, "seed": seed, "step": 0, "eval_nll": loss} for init, seed, loss in rows]
    return pa.Table.from_pylist(values, schema=COMPARISON)


def test_stages_stand_where_they_ran_and_breaks_are_left_out() -> None:
    """Of a run that was interrupted in its search and taken up again a day later."""

    def stage(seconds: float, *spans: list[float]) -> dict[str, object]:
        return {"seconds": seconds, "details": {}, "spans": [*spans]}

    day = 86_400.0
    stages = {
        "index": stage(8, [100, 108]),
        "search": stage(25, [109, 119], [day, day + 15]),
        "merge": stage(5, [day + 15, day + 20]),
    }
    assert plots.timeline(stages) == {"index": [(0, 8)], "search": [(8, 10), (18, 15)], "merge": [(33, 5)]}
    old = {"index": {"seconds": 8, "details": {}}, "search": {"seconds": 25, "details": {}}}
    assert plots.timeline(old) == {"index": [(0, 8)], "search": [(8, 25)]}
