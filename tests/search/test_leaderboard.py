"""The leaderboard against the same figures computed by hand, sample by sample."""

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.core.tables import BASE_ID, LEADERBOARD, SCORES
from pipeline.search.leaderboard import build_leaderboard, score_table, unsound
from pipeline.search.score_store import Known

N_SEARCH, S = 9, 12


def drawn(n: int, seed: int = 0) -> Known:
    generator = np.random.default_rng(seed)
    tokens = 3 + np.arange(S, dtype=np.int32) % 5
    return Known(generator.uniform(0.5, 3, (n, S)) * tokens, generator.integers(0, 3, (n, S)).astype(np.int32), tokens)


def ratio(sums: list[float], tokens: list[int]) -> tuple[float, float]:
    """sum(x) / sum(n) and its error by the delta method, with the sample variance of the residuals."""
    mean = sum(sums) / sum(tokens)
    residuals = [x - mean * n for x, n in zip(sums, tokens, strict=True)]
    return mean, statistics.stdev(residuals) * math.sqrt(len(sums)) / sum(tokens)


def by_hand(known: Known, place: int, end: int) -> dict[str, Any]:
    judged = range(min(end, N_SEARCH))
    tokens = [int(known.tokens_S[s]) for s in judged]
    nll, stderr = ratio([known.nll_NS[place, s] for s in judged], tokens)
    difference, difference_error = ratio([known.nll_NS[place, s] - known.nll_NS[0, s] for s in judged], tokens)
    held = [known.nll_NS[place, s] - known.nll_NS[0, s] for s in range(N_SEARCH, S)]
    figures = {
        "nll": nll,
        "stderr": stderr,
        "nll_minus_base": difference,
        "nll_minus_base_stderr": difference_error,
        "token_accuracy": sum(known.hits_NS[place, s] for s in judged) / sum(tokens),
    }
    holdout = pytest.approx(sum(held) / known.tokens_S[N_SEARCH:].sum(), abs=1e-12) if end == S else None
    close = {name: pytest.approx(value, abs=1e-12) for name, value in figures.items()}
    stopped = None if end == S else end
    return {"n_samples": len(tokens), "stopped_after": stopped, "holdout_nll_minus_base": holdout, **close}


def test_every_figure_equals_the_one_by_hand() -> None:
    known, names, seen = drawn(5), [BASE_ID, "a", "b", "c", "d"], [S, S, 4, N_SEARCH, S]
    board = build_leaderboard(names, known, seen, N_SEARCH)
    assert board.schema == LEADERBOARD
    rows = board.to_pylist()
    for place, row in enumerate(rows, start=1):
        candidate = names.index(row["adapter_id"])
        assert row == {"place": place, "adapter_id": names[candidate], **by_hand(known, candidate, seen[candidate])}
    base = next(row for row in rows if row["adapter_id"] == BASE_ID)
    assert (base["nll_minus_base"], base["nll_minus_base_stderr"], base["holdout_nll_minus_base"]) == (0, 0, 0)


def test_without_first_choices_there_is_no_token_accuracy() -> None:
    known = drawn(3)
    hits_NS = known.hits_NS.astype(np.float64)
    hits_NS[1, 0] = np.nan
    rows = build_leaderboard([BASE_ID, "a", "b"], replace(known, hits_NS=hits_NS), [S] * 3, N_SEARCH).to_pylist()
    assert {row["adapter_id"]: row["token_accuracy"] is None for row in rows} == {BASE_ID: False, "a": True, "b": False}


def test_who_went_further_stands_before_who_was_stopped() -> None:
    known = drawn(4)
    known.nll_NS[2] = 0.01  # lucky on the samples that it saw, and stopped all the same
    rows = build_leaderboard([BASE_ID, "a", "lucky", "c"], known, [S, S, 4, S], N_SEARCH).to_pylist()
    assert rows[-1]["adapter_id"] == "lucky"
    assert [row["nll"] for row in rows[:-1]] == sorted(row["nll"] for row in rows[:-1])


def test_by_token_accuracy_the_most_first_choices_stand_first_and_of_equals_the_lowest_loss() -> None:
    known, names = drawn(4), [BASE_ID, "a", "b", "c"]
    known.hits_NS[:] = 1
    known.hits_NS[2] = 2
    rows = build_leaderboard(names, known, [S] * 4, N_SEARCH, "token_accuracy").to_pylist()
    nll = {row["adapter_id"]: row["nll"] for row in rows}
    assert [row["adapter_id"] for row in rows] == ["b", *sorted({BASE_ID, "a", "c"}, key=nll.__getitem__)]


def test_who_was_not_scored_has_no_place() -> None:
    board = build_leaderboard([BASE_ID, "a", "failed"], drawn(3), [S, S, 0], N_SEARCH)
    assert sorted(board["adapter_id"].to_pylist()) == ["a", BASE_ID]


def test_equal_losses_are_ordered_by_name() -> None:
    known = drawn(3)
    known.nll_NS[:] = known.nll_NS[0]
    board = build_leaderboard([BASE_ID, "z", "a"], known, [S] * 3, N_SEARCH)
    assert board["adapter_id"].to_pylist() == ["a", BASE_ID, "z"]


def test_who_gave_no_number_on_a_sample_that_counts_is_set_aside_with_the_reason() -> None:
    known, names = drawn(4), [BASE_ID, "broken", "stopped before", "b"]
    known.nll_NS[1, 3] = known.nll_NS[2, 5] = np.inf
    seen = [S, S, 4, S]
    assert unsound(names, known, seen) == {"broken": f"NaN or Inf: its loss on 1 of {S} samples is no number"}
    board = build_leaderboard(names, known, seen, N_SEARCH)
    assert sorted(board["adapter_id"].to_pylist()) == ["b", BASE_ID, "stopped before"]


def test_a_base_that_gives_no_number_ends_the_search() -> None:
    known = drawn(2)
    known.nll_NS[0, 1] = np.inf
    with pytest.raises(ValueError, match="base model's own loss"):
        build_leaderboard([BASE_ID, "a"], known, [S] * 2, N_SEARCH)


def test_without_the_base_there_is_no_leaderboard() -> None:
    with pytest.raises(ValueError, match="base"):
        build_leaderboard([BASE_ID, "a"], drawn(2), [4, S], N_SEARCH)


def test_scores_are_written_with_a_row_a_pair_that_is_known() -> None:
    known = drawn(2)
    known.nll_NS[1, 5:] = np.nan
    table = score_table([BASE_ID, "a"], known, [f"s{n}" for n in range(S)])
    assert table.schema == SCORES
    assert len(table) == S + 5
    row = table.to_pylist()[S + 2]
    assert row == {
        "adapter_id": "a",
        "sample_id": "s2",
        "nll_sum": known.nll_NS[1, 2],
        "n_tokens": known.tokens_S[2],
        "n_correct": known.hits_NS[1, 2],
    }
