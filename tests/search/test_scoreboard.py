"""The leaderboard against the same figures computed by hand, sample by sample."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.search.scoreboard import build_leaderboard
from pipeline.search.store import ScoreFiles
from pipeline.storage import Folder
from pipeline.tables import BASE_ID, LEADERBOARD, SCORES

Draw = Callable[..., pa.Table]
SEARCH = [f"s{n}" for n in range(9)]
HOLDOUT = [f"h{n}" for n in range(3)]


@pytest.fixture
def files(tmp_path: Path) -> ScoreFiles:
    return ScoreFiles(Folder.at(tmp_path / "scores"))


@pytest.fixture(scope="module")
def samples() -> pa.Table:
    """Hold-out and search samples in mixed order."""
    ids = [*HOLDOUT[:2], *SEARCH, *HOLDOUT[2:]]
    return pa.table({"sample_id": ids, "split": ["holdout" if name in HOLDOUT else "search" for name in ids]})


def ratio(sums: list[float], tokens: list[int]) -> tuple[float, float]:
    """sum(x) / sum(n) and its error by the delta method, with the sample variance of the residuals."""
    mean = sum(sums) / sum(tokens)
    residuals = [x - mean * n for x, n in zip(sums, tokens, strict=True)]
    return mean, statistics.stdev(residuals) * math.sqrt(len(sums)) / sum(tokens)


def by_hand(scores: pa.Table, adapter: str) -> dict[str, Any]:
    rows = {(row["adapter_id"], row["sample_id"]): row for row in scores.to_pylist()}
    own, base = ([rows[name, sample] for sample in SEARCH] for name in (adapter, BASE_ID))
    tokens = [row["n_tokens"] for row in own]
    nll, stderr = ratio([row["nll_sum"] for row in own], tokens)
    pairs = [x["nll_sum"] - y["nll_sum"] for x, y in zip(own, base, strict=True)]
    difference, difference_error = ratio(pairs, tokens)
    held = [(rows[adapter, s]["nll_sum"] - rows[BASE_ID, s]["nll_sum"], rows[adapter, s]["n_tokens"]) for s in HOLDOUT]
    figures = {
        "nll": nll,
        "stderr": stderr,
        "nll_minus_base": difference,
        "nll_minus_base_stderr": difference_error,
        "token_accuracy": sum(row["n_correct"] for row in own) / sum(tokens),
        "holdout_nll_minus_base": sum(x for x, _ in held) / sum(n for _, n in held),
    }
    close = {name: pytest.approx(value, abs=1e-12) for name, value in figures.items()}
    return {"adapter_id": adapter, "n_samples": len(SEARCH), "stopped_after": None, **close}


def test_every_figure_equals_the_one_by_hand(files: ScoreFiles, samples: pa.Table, drawn_scores: Draw) -> None:
    scores = drawn_scores(["a", BASE_ID, "b", "c"], [*SEARCH, *HOLDOUT])
    shuffled = scores.take(list(range(len(scores)))[::-1])
    files.write(shuffled.filter(pa.compute.is_in(shuffled["adapter_id"], pa.array(["a", "c"]))), {})
    files.write(shuffled.filter(pa.compute.is_in(shuffled["adapter_id"], pa.array(["b", BASE_ID]))), {"d": "no"})
    board = build_leaderboard(files, samples)
    assert board.schema == LEADERBOARD
    rows = board.to_pylist()
    assert [row["place"] for row in rows] == [1, 2, 3, 4]
    assert [row["nll"] for row in rows] == sorted(row["nll"] for row in rows)
    for row in rows:
        assert row == {"place": row["place"], **by_hand(scores, row["adapter_id"])}
    base = next(row for row in rows if row["adapter_id"] == BASE_ID)
    assert (base["nll_minus_base"], base["nll_minus_base_stderr"], base["holdout_nll_minus_base"]) == (0, 0, 0)


def test_an_adapter_that_did_not_see_every_sample_has_no_place(files: ScoreFiles, samples: pa.Table, drawn_scores: Draw) -> None:
    files.write(drawn_scores([BASE_ID, "a"], [*SEARCH, *HOLDOUT]), {})
    files.write(drawn_scores(["partial"], SEARCH), {})
    assert sorted(build_leaderboard(files, samples)["adapter_id"].to_pylist()) == ["a", BASE_ID]


def test_equal_losses_are_ordered_by_name(files: ScoreFiles, samples: pa.Table, drawn_scores: Draw) -> None:
    for name in ("z", BASE_ID, "a"):
        files.write(drawn_scores([name], [*SEARCH, *HOLDOUT], 7), {})
    assert build_leaderboard(files, samples)["adapter_id"].to_pylist() == ["a", BASE_ID, "z"]


def test_a_loss_that_is_not_a_number_comes_last(files: ScoreFiles, samples: pa.Table, drawn_scores: Draw) -> None:
    scores = drawn_scores(["c", "broken", "a", BASE_ID, "b"], [*SEARCH, *HOLDOUT])
    losses = [math.nan if row["adapter_id"] == "broken" else row["nll_sum"] for row in scores.to_pylist()]
    files.write(scores.set_column(2, SCORES.field("nll_sum"), pa.array(losses)), {})
    rows = build_leaderboard(files, samples).to_pylist()
    assert rows[-1]["adapter_id"] == "broken"
    assert [row["nll"] for row in rows[:-1]] == sorted(row["nll"] for row in rows[:-1])


def test_without_the_base_there_is_no_leaderboard(files: ScoreFiles, samples: pa.Table, drawn_scores: Draw) -> None:
    files.write(drawn_scores(["a"], [*SEARCH, *HOLDOUT]), {})
    with pytest.raises(ValueError, match="base"):
        build_leaderboard(files, samples)
