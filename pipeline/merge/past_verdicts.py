"""What past runs teach of a verdict: the gain that it promises, and how often such verdicts were right.

A run that trained base and mashup to their ends keeps, beside the scores of its base model, how far the mashup was ahead on the
hold-out samples before any step, after a third of the steps, and at the end. Of fewer than FEWEST past runs nothing is concluded.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.core.ledger import digest
from pipeline.core.stats import interpolate, wilson_interval
from pipeline.core.storage import Folder
from pipeline.run_folder import Run
from pipeline.search.scoring import store_of
from pipeline.train.curves import chosen_arms
from pipeline.train.hedge import decision_step

FEWEST = 8
LATEST = 200
"""Past runs that are read at most."""

Json = Mapping[str, Any]


def foretell(past: Sequence[tuple[float, float]], difference: float) -> dict[str, Any]:
    """What a difference of losses foretells of the end.

    Args:
        past: of each past run that difference, mashup minus base, and in the end the base's loss minus the mashup's: the gain.
        difference: that of this run. All are in nats a completion token.

    Returns:
        `runs`, how many there are, and where they are FEWEST or more: `right`, how many differences had foretold the sign of
        the gain, with `interval`, the 95 % interval of that share; `gain`, what is expected by the least-squares line of gain on
        difference, at the nearest difference that was seen, and `spread`, the root mean square of what is left beside the line.
    """
    found: dict[str, Any] = {"runs": len(past)}
    if len(past) < FEWEST:
        return found
    differences, gains = np.array(past, dtype=np.float64).T
    right = int(((differences < 0) == (gains > 0)).sum())
    slope = float(np.cov(differences, gains, bias=True)[0, 1] / variance) if (variance := differences.var()) > 0 else 0.0
    expected = gains.mean() + slope * (np.clip(difference, differences.min(), differences.max()) - differences.mean())
    left = gains - gains.mean() - slope * (differences - differences.mean())
    spread = math.sqrt(float((left**2).sum()) / (len(past) - 2))
    return found | {"right": right, "interval": wilson_interval(right, len(past)), "gain": float(expected), "spread": spread}


def foretell_verdict(run: Run, nll_minus_base: float) -> dict[str, Any]:
    """What past runs with this base foretell of a mashup that is so far from the base on the hold-out samples."""
    return foretell([(one["holdout"], one["gain"]) for one in _past(run)], nll_minus_base)


def foretell_decision(run: Run, outcomes: Sequence[Json]) -> dict[str, Any]:
    """Likewise of the decision of a hedge, by the losses after a third of the steps, as `foretold`; nothing where there was none,
    or training diverged before it. The gain is that of the mashup over the base."""
    step = next((one["stopped_at"] for one in outcomes if "stopped_at" in one), None)
    losses = {
        init: [row["eval_nll"] for one in outcomes if one["init"] == init for row in one["curve"] if row["step"] == step]
        for init in ("base", "mashup")
    }
    if not all(losses.values()):
        return {}
    past = [(one["third"], one["gain"]) for one in _past(run)]
    return {"foretold": foretell(past, min(losses["mashup"]) - min(losses["base"]))}


def keep_verdict(run: Run, choice: Json, outcomes: Sequence[dict[str, Any]]) -> None:
    """Keep what came of a mashup on this target, for the verdicts of other runs; nothing where it, or the base, was not trained
    to the end.

    Args:
        choice: the selection, as in selection.json.
        outcomes: of all arms.
    """
    if {"base", "mashup"} <= {one["init"] for one in outcomes} and not any("stopped_at" in one for one in outcomes):
        _folder(run).write_json(_own(run), measure(choice, outcomes))


def chosen_candidate(choice: Json) -> Json:
    """Of the candidates of a selection that has one the recipe that was taken, with its losses."""
    found: Json = next(one for one in choice["candidates"] if one["name"] == choice["recipe"]["name"])
    return found


def measure(choice: Json, outcomes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a run that trained both: `holdout` and `third`, mashup minus base before training and after a third of the steps, and
    `gain`, base minus mashup at their best; the last two on the validation split, at each start's chosen rate, over seeds."""
    chosen = chosen_arms(outcomes)
    curves = {init: [one["curve"] for one in chosen[init]] for init in ("base", "mashup")}
    best = {init: fmean(min(row["eval_nll"] for row in curve) for curve in found) for init, found in curves.items()}
    third = decision_step(max(curve[-1]["step"] for curve in curves["base"]))
    at_third = {init: fmean(_at(curve, third) for curve in found) for init, found in curves.items()}
    return {
        "holdout": chosen_candidate(choice)["holdout_nll_minus_base"],
        "third": at_third["mashup"] - at_third["base"],
        "gain": best["base"] - best["mashup"],
    }


def _at(curve: Sequence[Json], step: int) -> float:
    return interpolate([row["step"] for row in curve], [row["eval_nll"] for row in curve], step)


def _past(run: Run) -> list[dict[str, float]]:
    """One of each other target."""
    folder = _folder(run)
    files = [name for name in folder.list_files(".json") if name != _own(run)]
    return [dict(folder.read_json(name)) for name in files[-LATEST:] if folder.is_complete(name)]


def _own(run: Run) -> str:
    """A target is its train split: with another sample of it, or other settings, it is the same one."""
    train = Folder.at(run.config.target.train)
    return f"{digest(train.uri, train.state())}.json"


def _folder(run: Run) -> Folder:
    return store_of(run).folder.sub("verdicts")
