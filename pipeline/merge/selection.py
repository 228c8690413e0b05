"""Leaderboard -> selection: which donors are merged, or nobody. Pure functions over tables; no Ray here.

Donors are ranked on the search split. How many of them to merge, and whether to merge at all, is decided on the hold-out
split, which played no part in the ranking.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import METHODS, ON_SAMPLES, MergeConfig
from pipeline.core.tables import BASE_ID
from pipeline.merge.recipes import Recipe
from pipeline.train.starts import trained_rank

CANDIDATE_SIZES = (1, 2, 3, 5, 8)
SAME_WEIGHTS = 0.1
"""Weights that differ by less are as good as equal ones."""

Probed = Mapping[str, float | None]
"""Name of a recipe, or BASE_ID -> hold-out NLL after a few finetuning steps from it; None where that diverged."""


@dataclass(frozen=True)
class Scored:
    """A candidate recipe with its loss on the hold-out samples, in nats a completion token."""

    recipe: Recipe
    nll: float
    nll_minus_base: float
    stderr: float
    kept_energy: float
    nll_minus_best: float
    """The paired difference to the candidate of the lowest loss, with its standard error."""
    stderr_to_best: float

    @property
    def surely_behind(self) -> bool:
        """Whether the lowest loss is more than a standard error away; a single sample has none."""
        return not self.nll_minus_best <= self.stderr_to_best


def eligible_donors(leaderboard: pa.Table) -> list[dict[str, Any]]:
    """Donors that beat the base on the search split and on the hold-out split, in the leaderboard's order."""
    rows = (row for row in leaderboard.to_pylist() if row["adapter_id"] != BASE_ID)
    measured = (row for row in rows if row["holdout_nll_minus_base"] is not None)  # the others were stopped before
    return [row for row in measured if row["nll_minus_base"] < 0 and row["holdout_nll_minus_base"] < 0]


def propose(leaderboard: pa.Table, catalogue: pa.Table, config: MergeConfig) -> list[Recipe]:
    """Recipes worth scoring. Empty where no donor beats the base.

    For each k asked for: the top k donors in equal parts, and in proportion to their gains where that makes a difference. Where
    weights found on the samples are asked for, besides equal ones, one recipe of the most donors, for which they are yet to be
    found. Where nothing is asked for, the paper's recipe is a rival.
    """
    donors, ranks = _one_a_family(eligible_donors(leaderboard), catalogue), _ranks(catalogue)
    sizes = CANDIDATE_SIZES if config.k == "auto" else (min(config.k, len(donors)),)
    tops = [donors[:k] for k in sizes if 0 < k <= len(donors)]
    on_samples = config.weights in ON_SAMPLES
    weightings = ("equal", "gains") if config.weights == "auto" else ("equal",) if on_samples else (config.weights,)
    recipes = [_recipe(top, weighting, ranks, config) for top in tops for weighting in weightings]
    if config.weights == "auto":
        recipes = [recipe for recipe in recipes if recipe.weighting == "equal" or _spread(recipe) > SAME_WEIGHTS]
    if on_samples and recipes:
        recipes.append(replace(recipes[-1], weighting=config.weights))
    if len(donors) > 1 and config.method == config.k == config.weights == "auto" and _alike(donors[:2], catalogue):
        recipes.append(_recipe(donors[:2], "equal", ranks, config.model_copy(update={"method": "ab_mean"})))
    return recipes


def most_recipes(config: MergeConfig, n_candidates: int) -> int:
    """How many recipes `propose` gives of so many candidates at most."""
    sizes = sum(k <= n_candidates for k in CANDIDATE_SIZES) if config.k == "auto" else 1
    if config.weights != "auto":
        return sizes + (config.weights in ON_SAMPLES)
    return 2 * sizes + (config.method == config.k == "auto")


def largest_merge(ranks: Sequence[int], config: MergeConfig) -> int:
    """The largest rank that a recipe of donors of these ranks can have."""
    most = max(CANDIDATE_SIZES) if config.k == "auto" else config.k
    return _rank(sorted(ranks)[-most:], "exact" if config.method == "auto" else config.method, config.rank)


def of_fewer(recipe: Recipe, indices: Sequence[int], catalogue: pa.Table, config: MergeConfig) -> Recipe:
    """The recipe with only the donors at these indices, in equal parts."""
    donors = tuple(recipe.donors[index] for index in indices)
    ranks = _ranks(catalogue)
    rank = _rank([ranks[donor] for donor in donors], recipe.method, config.rank)
    return replace(recipe, donors=donors, weights=(1 / len(donors),) * len(donors), rank=rank)


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """The candidates that beat the base on the hold-out samples: first those within a standard error of the lowest loss, the
    fewest donors first (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3),
    then the others, the lowest loss first."""

    def order(one: Scored) -> tuple[bool, int, float]:
        return one.surely_behind, 0 if one.surely_behind else len(one.recipe.donors), one.nll_minus_base

    return sorted((one for one in scored if one.nll_minus_base < 0), key=order)


def choose(scored: Sequence[Scored], probed: Probed | None = None) -> Scored | None:
    """The first of `ranked`, or where a few finetuning steps were made the one of the lowest hold-out loss after them, if it is
    below the base's. None: start from the base."""
    if not probed:
        return next(iter(ranked(scored)), None)
    after = {name: nll for name, nll in probed.items() if nll is not None}
    best = min(after, key=lambda name: after[name], default=BASE_ID)
    return next((one for one in scored if one.recipe.name == best), None)


def selection(
    scored: Sequence[Scored],
    leaderboard: pa.Table,
    catalogue: pa.Table,
    contamination: Mapping[str, Sequence[str]],
    base_nll: float | None,
    probed: Probed | None = None,
) -> dict[str, Any]:
    """The selection file: the verdict, why, the donors with their weights and hashes, and every rival.

    Args:
        contamination: as `contamination.find_contamination` gives it.
    """
    best, probed = choose(scored, probed), probed or {}
    return {
        "verdict": "mashup" if best else "base",
        "why": _why(best, scored, len(leaderboard) - 1, probed),
        "base_holdout_nll": base_nll,
        "base_probe_nll": probed.get(BASE_ID),
        "recipe": best.recipe.as_dict() if best else None,
        "donors": _donors(best.recipe, leaderboard, catalogue, contamination) if best else [],
        "candidates": [
            {
                **candidate.recipe.as_dict(),
                "holdout_nll": candidate.nll,
                "holdout_nll_minus_base": candidate.nll_minus_base,
                "stderr": candidate.stderr,
                "holdout_nll_minus_best": candidate.nll_minus_best,
                "stderr_to_best": candidate.stderr_to_best,
                "kept_energy": candidate.kept_energy,
                "probe_nll": probed.get(candidate.recipe.name),
            }
            for candidate in sorted(scored, key=lambda one: one.nll_minus_base)
        ],
    }


def _recipe(donors: list[dict[str, Any]], weighting: str, ranks: dict[str, int], config: MergeConfig) -> Recipe:
    names = tuple(donor["adapter_id"] for donor in donors)
    method = "exact" if config.method == "auto" else config.method
    shares = [1.0 if weighting == "equal" else -donor["nll_minus_base"] for donor in donors]
    weights = tuple(share / sum(shares) for share in shares)
    return Recipe(names, weights, method, _rank([ranks[name] for name in names], method, config.rank), weighting)


def _one_a_family(donors: list[dict[str, Any]], catalogue: pa.Table) -> list[dict[str, Any]]:
    """Of donors that are one delta weight in several sizes the best: together they would count twice."""
    families = dict(zip(catalogue["adapter_id"].to_pylist(), catalogue["family"].to_pylist(), strict=True))
    best: dict[str, dict[str, Any]] = {}
    for donor in donors:
        best.setdefault(families[donor["adapter_id"]] or donor["adapter_id"], donor)
    return list(best.values())


def _alike(donors: list[dict[str, Any]], catalogue: pa.Table) -> bool:
    """Whether A and B of these donors can be averaged apart, by what the catalogue says of them."""
    names = {donor["adapter_id"] for donor in donors}
    rows = (row for row in catalogue.to_pylist() if row["adapter_id"] in names)
    return len({(row["rank"], row["alpha"], row["use_rslora"], tuple(row["target_modules"])) for row in rows}) == 1


def _ranks(catalogue: pa.Table) -> dict[str, int]:
    return dict(zip(catalogue["adapter_id"].to_pylist(), catalogue["rank"].to_pylist(), strict=True))


def _rank(ranks: list[int], method: str, asked: int | str) -> int:
    """Lossless methods always have the sum of the donors' ranks."""
    return sum(ranks) if METHODS[method].lossless else trained_rank(max(ranks), asked)


def _spread(recipe: Recipe) -> float:
    return max(recipe.weights) - min(recipe.weights)


def _why(best: Scored | None, scored: Sequence[Scored], n_donors: int, probed: Probed | None) -> str:
    if probed:
        first = f"{best.recipe.name} has" if best else "the base has"
        return f"{first} the lowest hold-out loss after a few finetuning steps from each of {len(probed)} starts"
    if best:
        which = "the lowest hold-out loss"
        if any(one.nll_minus_base < best.nll_minus_base for one in scored):
            which = "the fewest donors within a standard error of the lowest hold-out loss"
        gain = f"{best.nll_minus_base:+.4f} nats a token against the base"
        return f"{best.recipe.name} has {which} of {len(scored)} candidates: {gain}"
    if not scored:
        return f"none of {n_donors} scored donors beats the base on the search and on the hold-out samples"
    return f"none of {len(scored)} candidate merges beats the base on the hold-out samples"


def _donors(
    recipe: Recipe, leaderboard: pa.Table, catalogue: pa.Table, contamination: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    entries = {row["adapter_id"]: row for row in catalogue.to_pylist()}
    rows = {row["adapter_id"]: row for row in leaderboard.to_pylist()}
    return [
        {
            "adapter_id": donor,
            "weight": weight,
            "uri": entries[donor]["uri"],
            "sha256": entries[donor]["sha256"],
            "adapter_hash": entries[donor]["adapter_hash"],
            "base_model": entries[donor]["base_model"],
            "rank": entries[donor]["rank"],
            "license": entries[donor]["license"],
            "contamination": list(contamination.get(donor, [])),
            "place": rows[donor]["place"],
            "nll": rows[donor]["nll"],
            "nll_minus_base": rows[donor]["nll_minus_base"],
        }
        for donor, weight in zip(recipe.donors, recipe.weights, strict=True)
    ]
