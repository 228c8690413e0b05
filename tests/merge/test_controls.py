"""Starts that a mashup should be better than."""

from boards import BOARD, POOL

from pipeline.merge.controls import control_recipes


def test_controls_are_the_papers_recipe_the_best_donor_and_random_ones() -> None:
    controls = control_recipes(BOARD, POOL, n_donors=3, rank=9)
    assert {recipe.rank for recipe in controls.values()} == {9}
    paper, best, drawn = (controls[init] for init in ("paper", "best_donor", "random_donors"))
    assert (paper.donors, paper.weights, paper.method) == (("a", "b"), (0.5, 0.5), "ab_mean")
    assert (best.donors, best.method) == (("a",), "exact")
    assert len(set(drawn.donors)) == 3
    assert drawn == control_recipes(BOARD, POOL, n_donors=3, rank=9)["random_donors"]
