"""What the curves of the arms come to, base against mashup at the same budget: validation picks, test reports.

An arm is an init at a learning rate and a seed. Arms of one seed see the same rows in the same order; patience may end some
early. The learning rate of an init, and the checkpoint of an arm, are those of the lowest validation NLL; the test split is
touched once, by the chosen checkpoints alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa

from pipeline.core.ledger import digest
from pipeline.core.stats import interpolate, steps_to_parity
from pipeline.core.storage import Folder
from pipeline.train.arm import Job, checkpoints_without, row_ids
from pipeline.train.hedge import cost
from pipeline.train.ray_train import curve_table, on_each, score_on_test
from pipeline.train.tune import Outcome

TEST_METRICS = ("test_nll", "test_token_accuracy", "test_exact_match", "test_answer_match")


def compare_arms(
    jobs: Sequence[Job], outcomes: Sequence[Outcome], storage: Folder, decision: Mapping[str, Any] | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """The table of all curves, and what it comes to: per init the chosen rate and its test metrics, and the parity. Of a hedge,
    which has none, what it decided and what it cost; a start that was stopped is tested only if its weights are the better ones.

    Args:
        storage: where `train_arms` left the outcomes.
        decision: that of a hedge; see `hedge.decide`.

    Raises:
        RuntimeError: every arm of an init diverged, but for one that a hedge stopped.
    """
    chosen = chosen_arms(_of_use(outcomes, decision))
    best = min(chosen, key=lambda init: fmean(map(_best_nll, chosen[init])))
    finalists = [arms for init, arms in chosen.items() if not decision or init in (decision["winner"], best)]
    tested = _test(jobs[0], [outcome for arms in finalists for outcome in arms], storage)
    summary: dict[str, Any] = {"inits": {init: _describe(arms, outcomes, tested) for init, arms in chosen.items()}}
    if decision:
        summary["hedge"] = {**decision, "steps": jobs[0].train.steps, "kept": best, "cost": cost(outcomes, decision)}
    elif "base" in chosen:
        parities = {init: parity(chosen["base"], arms) for init, arms in chosen.items()}
        for init, found in parities.items():
            summary["inits"][init]["parity_steps"] = found["steps"]
        if "mashup" in parities:
            summary["parity"] = parities["mashup"]
    return curve_table(outcomes), summary


def _of_use(outcomes: Sequence[Outcome], decision: Mapping[str, Any] | None) -> list[Outcome]:
    """Without a start that a hedge stopped because all its arms had diverged."""
    lost = decision["stopped"] if decision and decision["validation_nll"][decision["stopped"]] is None else None
    return [outcome for outcome in outcomes if outcome["init"] != lost]


def chosen_arms(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Of each init the arms that its figures are of, one a seed.

    Raises:
        RuntimeError: every arm of an init diverged.
    """
    inits = list(dict.fromkeys(outcome["init"] for outcome in outcomes))
    return {init: _chosen([outcome for outcome in outcomes if outcome["init"] == init]) for init in inits}


def parity(base: Sequence[Outcome], mashup: Sequence[Outcome]) -> dict[str, Any]:
    """When the mashup's validation NLL comes down to the base runs' final one, linearly interpolated; both are means over seeds.

    Returns:
        The steps and the training seconds at parity, None where it is not reached; the same steps of each seed by itself
        against the base run of that seed; the base's steps, training seconds and target.
    """
    ours, theirs = _mean_curve(mashup), _mean_curve(base)
    base_steps, target = theirs["step"][-1], theirs["eval_nll"][-1]
    steps = steps_to_parity(ours["step"], ours["eval_nll"], target)
    return {
        "reached": steps is not None,
        "steps": steps,
        "steps_by_seed": [_steps_of_seed(one["curve"], other["curve"]) for one, other in zip(base, mashup, strict=True)],
        "base_steps": base_steps,
        "steps_saved": None if steps is None else 1 - steps / base_steps,
        "train_seconds": None if steps is None else interpolate(ours["step"], ours["seconds"], steps),
        "base_seconds": theirs["seconds"][-1],
        "target_nll": target,
    }


def with_overhead(parity: dict[str, Any], overhead_seconds: float) -> dict[str, Any]:
    """Wall-clock to parity: the mashup pays for everything that the base start does without.

    Returns:
        The parity with `seconds`, `seconds_saved` as a share of the base's, and `break_even_seconds`: how long training from the
        base must take for the mashup to win, T with overhead + T x (share of training time to parity) = T; None: however long.
    """
    if parity["train_seconds"] is None:
        return {**parity, "seconds": None, "seconds_saved": None, "break_even_seconds": None}
    seconds = parity["train_seconds"] + overhead_seconds
    kept = 1 - parity["train_seconds"] / parity["base_seconds"]
    break_even = overhead_seconds / kept if kept > 0 else None
    return {
        **parity,
        "seconds": seconds,
        "seconds_saved": 1 - seconds / parity["base_seconds"],
        "break_even_seconds": break_even,
    }


def _chosen(arms: Sequence[Outcome]) -> list[Outcome]:
    """The arms of the learning rate with the lowest best validation NLL, mean over seeds."""
    sound = [arm for arm in arms if arm["diverged_at"] is None]
    rates = {arm["lr"] for arm in sound}
    complete = [rate for rate in rates if all(arm["diverged_at"] is None for arm in arms if arm["lr"] == rate)]
    if not complete:
        raise RuntimeError(f"init {arms[0]['init']}: training diverged at every learning rate; add a lower one")
    best = min(complete, key=lambda rate: (fmean(_best_nll(arm) for arm in sound if arm["lr"] == rate), rate))
    return sorted((arm for arm in sound if arm["lr"] == best), key=lambda arm: arm["seed"])


def _best_nll(arm: Outcome) -> float:
    return float(min(point["eval_nll"] for point in arm["curve"]))


def _test(job: Job, arms: Sequence[Outcome], storage: Folder) -> dict[str, Any]:
    """Metrics on the test split of the chosen checkpoints, each kept beside its arm's result; `job` is that of any arm."""
    file = f"test-{digest(TEST_METRICS, row_ids(job.data, 'test'))}.json"
    for name, metrics in _tested(job, checkpoints_without(file, arms, storage), storage):
        storage.write_json(f"{name}/{file}", metrics)
    return {arm["name"]: storage.read_json(f"{arm['name']}/{file}") for arm in arms}


def _tested(job: Job, checkpoints: dict[str, Folder], storage: Folder) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and metrics of each checkpoint, as they come."""
    from pipeline.train.evaluate import evaluate_on_test  # not above: see pipeline/train/ray_train.py

    if checkpoints and job.train.shard:
        yield from score_on_test(job, checkpoints, storage).items()
    else:
        yield from on_each(evaluate_on_test, job, checkpoints)


def _describe(arms: Sequence[Outcome], outcomes: Sequence[Outcome], tested: dict[str, dict[str, float]]) -> dict[str, Any]:
    init = arms[0]["init"]
    best = min(arms, key=_best_nll)
    return {
        "lr": arms[0]["lr"],
        "seeds": [arm["seed"] for arm in arms],
        **_test_figures(arms, tested),
        **({"stopped_at": best["stopped_at"]} if "stopped_at" in best else {}),
        "validation_nll_start": fmean(arm["curve"][0]["eval_nll"] for arm in arms),
        "validation_nll_final": fmean(arm["curve"][-1]["eval_nll"] for arm in arms),
        "validation_nll_best": fmean(_best_nll(arm) for arm in arms),
        "best_step": best["best_step"],
        "checkpoint": f"train/{best['checkpoint']}",
        "train_seconds": fmean(arm["curve"][-1]["seconds"] for arm in arms),
        "startup_seconds": fmean(arm["startup_seconds"] for arm in arms),
        "tokens_per_pass": {
            one["name"]: one["tokens_per_pass"] for one in outcomes if one["init"] == init and "tokens_per_pass" in one
        },
        "diverged": {one["name"]: one["diverged_at"] for one in outcomes if one["init"] == init and one["diverged_at"]},
    }


def _test_figures(arms: Sequence[Outcome], tested: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Empty for an init that is not tested."""
    measured = [tested[arm["name"]] for arm in arms if arm["name"] in tested]
    if not measured:
        return {}
    by_seed = [{metric: one[metric] for metric in TEST_METRICS} for one in measured]
    return {metric: spread([one[metric] for one in measured]) for metric in TEST_METRICS} | {"test_by_seed": by_seed}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over seeds and their sample standard deviation; one seed has none."""
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else None}


def _mean_curve(arms: Sequence[Outcome]) -> dict[str, list[float]]:
    """Step -> validation NLL and training seconds, mean over seeds. An arm that ended early stays where it ended."""
    curves = [arm["curve"] for arm in arms]
    longest = max(curves, key=len)
    held = [curve + [curve[-1]] * (len(longest) - len(curve)) for curve in curves]
    means = {
        name: [fmean(point[name] for point in points) for points in zip(*held, strict=True)] for name in ("eval_nll", "seconds")
    }
    return {"step": [float(point["step"]) for point in longest], **means}


def _steps_of_seed(base: Sequence[dict[str, Any]], mashup: Sequence[dict[str, Any]]) -> float | None:
    """Step at which one mashup curve reaches the final loss of one base curve."""
    return steps_to_parity([point["step"] for point in mashup], [point["eval_nll"] for point in mashup], base[-1]["eval_nll"])
