"""From a leaderboard to a selection: who is eligible, which recipes are tried, which one wins, or nobody."""

from typing import Any

import pyarrow as pa
import pytest
from boards import BOARD, POOL, catalogue, leaderboard

from pipeline.config import MergeConfig
from pipeline.core.tables import CATALOGUE
from pipeline.merge.recipes import Recipe
from pipeline.merge.selection import Scored, choose, eligible_donors, largest_merge, most_recipes, propose, ranked, selection


def test_eligible_is_who_beats_the_base_on_both_splits() -> None:
    assert [row["adapter_id"] for row in eligible_donors(BOARD)] == ["a", "c", "d"]


def test_a_donor_whose_loss_is_not_a_number_is_not_eligible() -> None:
    assert eligible_donors(leaderboard(("a", float("nan"), -1.0), ("b", -1.0, float("nan")))) == []


def test_auto_proposes_the_top_k_of_every_size_that_the_donors_allow() -> None:
    recipes = propose(BOARD, POOL, MergeConfig(weights="equal"))
    assert [recipe.donors for recipe in recipes] == [("a",), ("a", "c"), ("a", "c", "d")]
    assert [recipe.rank for recipe in recipes] == [32, 32, 32]
    assert {recipe.method for recipe in recipes} == {"exact"}
    assert all(sum(recipe.weights) == pytest.approx(1) for recipe in recipes)


def test_of_one_delta_weight_in_several_sizes_the_best_is_merged_and_no_other() -> None:
    rows = [row | {"family": "c" if row["adapter_id"] == "a" else row["adapter_id"]} for row in POOL.to_pylist()]
    recipes = propose(BOARD, pa.Table.from_pylist(rows, schema=CATALOGUE), MergeConfig(weights="equal"))
    assert [recipe.donors for recipe in recipes] == [("a",), ("a", "d")]


@pytest.mark.parametrize(("k", "donors"), [(1, ("a",)), (2, ("a", "c")), (9, ("a", "c", "d"))])
def test_a_given_k_is_one_recipe_of_as_many_donors_as_there_are(k: int, donors: tuple[str, ...]) -> None:
    assert [recipe.donors for recipe in propose(BOARD, POOL, MergeConfig(k=k, weights="equal"))] == [donors]


def test_weights_by_gain_are_tried_where_they_differ_from_equal_ones() -> None:
    recipes = propose(BOARD, POOL, MergeConfig())
    assert [recipe.name for recipe in recipes] == ["exact-1", "exact-2", "exact-2-gains", "exact-3", "exact-3-gains"]
    assert recipes[4].weights == pytest.approx((5 / 9, 3 / 9, 1 / 9))
    alike = leaderboard(("a", -0.5, -0.4), ("c", -0.49, -0.2))
    assert [recipe.name for recipe in propose(alike, POOL, MergeConfig())] == ["exact-1", "exact-2"]
    (asked,) = propose(alike, POOL, MergeConfig(k=2, weights="gains"))
    assert asked.weights == pytest.approx((50 / 99, 49 / 99))


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        ({"k": 2, "rank": 3}, {"a": 4, "c": 16}, 3),
        ({"k": 2}, {"a": 8, "c": 4}, 32),
        ({"k": 2}, {"a": 100, "c": 60}, 100),
        ({"k": 2, "method": "ab_mean"}, {"a": 16, "c": 16}, 32),
        ({"k": 2, "method": "concat"}, {"a": 60, "c": 60}, 120),
    ],
    ids=["given", "the usual one", "the largest donor's above that", "of ab_mean, too", "concat has the sum"],
)
def test_the_rank_of_a_recipe(config: dict[str, Any], ranks: dict[str, int], expected: int) -> None:
    board = leaderboard(*((name, -0.1 - place, -0.1) for place, name in enumerate(ranks)))
    (recipe,) = propose(board, catalogue(**ranks), MergeConfig(**config, weights="equal"))
    assert recipe.rank == expected


def test_the_papers_recipe_is_a_rival_where_its_donors_are_alike() -> None:
    board = leaderboard(("a", -0.5, -0.4), ("e", -0.4, -0.4), ("b", -0.3, -0.4))
    (paper,) = (recipe for recipe in propose(board, POOL, MergeConfig()) if recipe.method == "ab_mean")
    assert (paper.donors, paper.weights, paper.rank) == (("a", "e"), (0.5, 0.5), 32)
    unlike = leaderboard(("a", -0.5, -0.4), ("b", -0.4, -0.4))
    for config in (MergeConfig(k=2), MergeConfig(method="exact"), MergeConfig(weights="equal")):
        assert "ab_mean" not in {recipe.method for recipe in propose(board, POOL, config)}
    assert "ab_mean" not in {recipe.method for recipe in propose(unlike, POOL, MergeConfig())}


def test_engines_that_stay_for_the_merge_hold_the_largest_of_its_recipes() -> None:
    ranks = [4, 8, 16, 2, 4]
    assert largest_merge(ranks, MergeConfig()) == 32
    assert largest_merge([64, 8], MergeConfig(k=1)) == 64
    assert largest_merge([60, 60], MergeConfig(method="concat")) == 120
    assert largest_merge(ranks, MergeConfig(rank=99)) == 99


def test_learned_weights_are_for_the_most_donors_and_rival_equal_ones() -> None:
    recipes = propose(BOARD, POOL, MergeConfig(weights="learned"))
    assert [recipe.name for recipe in recipes] == ["exact-1", "exact-2", "exact-3", "exact-3-learned"]
    assert propose(leaderboard(("a", 0.1, -0.1)), POOL, MergeConfig(weights="learned")) == []


@pytest.mark.parametrize("weights", ["auto", "equal", "gains", "greedy", "learned"])
@pytest.mark.parametrize("k", ["auto", 2])
def test_no_more_recipes_are_proposed_than_is_said(weights: Any, k: Any) -> None:
    config = MergeConfig(k=k, weights=weights)
    assert 0 < len(propose(BOARD, POOL, config)) <= most_recipes(config, len(POOL)) <= 11


def test_no_eligible_donor_no_recipe() -> None:
    assert propose(leaderboard(("a", 0.1, -0.1)), POOL, MergeConfig()) == []
    assert propose(leaderboard(("a", 0.1, -0.1)), POOL, MergeConfig(k=2)) == []


def scored(donors: str, difference: float, behind: float = 1.0) -> Scored:
    """A candidate that is so far from the lowest loss, with a standard error of 0.15 between them."""
    weights = (1 / len(donors),) * len(donors)
    return Scored(Recipe(tuple(donors), weights, "exact", 8), 2 + difference, difference, 0.01, 1.0, behind, 0.15)


def test_where_starts_were_probed_the_loss_after_the_steps_decides() -> None:
    single, pair = scored("a", -0.4), scored("ac", -0.6)
    assert choose([single, pair], {"base": 1.9, "exact-1": 1.2, "exact-2": 1.5}) == single
    assert choose([single, pair], {"base": 1.1, "exact-1": 1.2, "exact-2": None}) is None
    assert choose([single, pair], {"base": None, "exact-1": None, "exact-2": None}) is None
    found = selection([single, pair], BOARD, POOL, {}, 2.0, {"base": 1.9, "exact-1": 1.2, "exact-2": 1.5})
    assert found["why"] == "exact-1 has the lowest hold-out loss after a few finetuning steps from each of 3 starts"
    assert (found["base_probe_nll"], [one["probe_nll"] for one in found["candidates"]]) == (1.9, [1.5, 1.2])


def test_the_lowest_hold_out_loss_wins_if_it_beats_the_base() -> None:
    best = scored("ac", -0.6)
    assert choose([scored("a", -0.4), best, scored("acd", 0.1)]) == best
    assert choose([scored("a", 0.0), scored("ac", 0.1)]) is None
    assert choose([]) is None


def test_of_those_within_a_standard_error_of_the_lowest_loss_the_fewest_donors_win() -> None:
    """What is saved in donors counts more than a difference that other samples may not show."""
    told = [scored("acd", -0.6, 0.0), scored("ac", -0.5, 0.1), scored("acde", -0.45, 0.15), scored("a", -0.4, 0.2)]
    assert [one.surely_behind for one in told] == [False, False, False, True]
    assert [one.recipe.name for one in ranked(told)] == ["exact-2", "exact-3", "exact-4", "exact-1"]
    found = selection(told, BOARD, POOL, {}, base_nll=2.0)
    assert found["recipe"]["name"] == "exact-2"
    assert "the fewest donors within a standard error of the lowest hold-out loss of 4 candidates: -0.5000" in found["why"]
    assert [one["holdout_nll_minus_best"] for one in found["candidates"]] == [0.0, 0.1, 0.15, 0.2]


def test_a_candidate_whose_loss_is_not_a_number_never_wins() -> None:
    assert choose([scored("a", float("nan")), scored("ac", -0.1)]) == scored("ac", -0.1)
    assert choose([scored("ac", -0.1), scored("a", float("nan"))]) == scored("ac", -0.1)
    assert choose([scored("a", float("nan"))]) is None


def test_a_selection_names_the_donors_the_reason_and_the_rivals() -> None:
    found = selection([scored("a", -0.4), scored("ac", -0.6)], BOARD, POOL, {"a": ["its card says so"]}, base_nll=2.0)
    assert found["verdict"] == "mashup"
    assert "exact-2 has the lowest hold-out loss of 2 candidates: -0.6000" in found["why"]
    assert found["base_holdout_nll"] == 2.0
    assert found["recipe"]["donors"] == ("a", "c")
    assert [(d["adapter_id"], d["weight"], d["uri"], d["rank"]) for d in found["donors"]] == [
        ("a", 0.5, "/pool/a", 4),
        ("c", 0.5, "/pool/c", 16),
    ]
    assert [donor["nll_minus_base"] for donor in found["donors"]] == [-0.5, -0.3]
    assert [donor["contamination"] for donor in found["donors"]] == [["its card says so"], []]
    assert [candidate["holdout_nll_minus_base"] for candidate in found["candidates"]] == [-0.6, -0.4]


@pytest.mark.parametrize(
    ("candidates", "why"),
    [
        ([], "none of 5 scored donors beats the base on the search and on the hold-out samples"),
        ([scored("a", 0.2)], "none of 1 candidate merges beats the base on the hold-out samples"),
    ],
)
def test_a_selection_of_nobody_says_why(candidates: list[Scored], why: str) -> None:
    found = selection(candidates, BOARD, POOL, {}, base_nll=None)
    assert (found["verdict"], found["recipe"], found["donors"], found["why"]) == ("base", None, [], why)
