"""What the arms of one task come to: by our accounting, and by the paper's. Plain functions over rows of the study's table.

Ours: validation chose rates and checkpoints, parity is by validation NLL, and all that finding donors took is charged.

The paper's (its published code, f02d965): of each start the rate with the highest final accuracy on the split that is reported,
here the validation split; parity is the share of the training at which the accuracy comes up to the base's final one, linearly
interpolated, 0 where it is there before any step and 1 where it never gets there; the time charged is one evaluation of one
donor, and the merge. Accuracy is that of the answer's tokens, without the end of the turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.study_arms import Numbers, StudyArm
from pipeline.core.stats import interpolate, steps_to_parity

DONORLESS = ("base", "pissa", "olora", "corda", "lora_ga", "eva")
"""Starts that no search is charged to."""


@dataclass(frozen=True)
class Figures:
    """One start on one task, means over its seeds. `exact_match_spread`: sample standard deviation over seeds; None: one seed."""

    nll: float
    token_accuracy: float
    exact_match: float
    answer_match: float
    """Exact match without the end of the turn."""
    exact_match_spread: float | None
    parity: float | None
    """Share of the base's steps at parity; None: not reached."""
    seconds_saved: float
    """Share of the base's training seconds, all overhead counted; without parity all overhead and nothing saved."""


@dataclass(frozen=True)
class PaperFigures:
    """One start on one task by the paper's accounting, means over seeds. Times are shares of the base's training time."""

    accuracy: float
    parity: float
    time: float | None
    """With what the paper charges; None: that was not measured."""
    time_all: float
    """With all overhead."""


@dataclass(frozen=True)
class Task:
    """One task on one base."""

    name: str
    base: str
    kin: bool
    verdict: str
    recipe: str
    overhead_seconds: float
    base_seconds: float
    starts: dict[str, Figures]
    by_paper: dict[str, PaperFigures]
    worse: bool
    """Whether the mashup has less exact match than the base, beyond two standard errors of so many test rows."""

    def of(self, init: str) -> Figures | None:
        """Figures of a start; where the verdict is to start from the base, the mashup's are the base's."""
        return self.starts.get("base" if init == "mashup" and self.verdict == "base" else init)


def account(arms: Sequence[StudyArm]) -> Task | None:
    """What the arms of one task on one base come to; None where none is from the base."""
    chosen: dict[str, list[StudyArm]] = {}
    for arm in sorted((arm for arm in arms if arm.is_chosen), key=lambda arm: arm.seed):
        chosen.setdefault(arm.init, []).append(arm)
    if "base" not in chosen:
        return None
    base = chosen["base"]
    starts = {init: _figures(found, base) for init, found in chosen.items()}
    mashup = chosen.get("mashup", base)[-1]
    return Task(
        mashup.task,
        mashup.base,
        mashup.kin,
        mashup.verdict,
        mashup.recipe,
        fmean(arm.overhead_seconds for arm in base),
        fmean(arm.seconds[-1] for arm in base),
        starts,
        _by_paper(arms),
        _is_worse(starts.get("mashup", starts["base"]).exact_match, starts["base"].exact_match, base[0].test_rows),
    )


def parity_by_accuracy(steps: Numbers, accuracy: Numbers, target: float) -> float:
    """Share of the steps at which an accuracy comes up to `target`; never counts as all of them."""
    at = steps_to_parity(steps, [-value for value in accuracy], -target)
    return 1.0 if at is None else at / steps[-1]


def _figures(arms: Sequence[StudyArm], base: Sequence[StudyArm]) -> Figures:
    matches = [arm.test_exact_match or 0.0 for arm in arms]
    parity, seconds_saved = _parity(arms, base)
    return Figures(
        fmean(arm.test_nll or 0.0 for arm in arms),
        fmean(arm.test_token_accuracy or 0.0 for arm in arms),
        fmean(matches),
        fmean(arm.test_answer_match or 0.0 for arm in arms),
        stdev(matches) if len(matches) > 1 else None,
        parity,
        seconds_saved,
    )


def _parity(arms: Sequence[StudyArm], base: Sequence[StudyArm]) -> tuple[float | None, float]:
    """Share of steps at parity, and of seconds saved: of the mean curves of the seeds that both have."""
    theirs = [arm for arm in base if arm.seed in {one.seed for one in arms}]
    ours = [arm for arm in arms if arm.seed in {one.seed for one in theirs}]
    if not ours:
        return None, 0.0
    base_seconds = fmean(arm.seconds[-1] for arm in theirs)
    overhead = fmean(_overhead(arm) for arm in ours)
    steps, losses = _mean(ours, "steps"), _mean(ours, "validation_nll")
    at = steps_to_parity(steps, losses, fmean(arm.validation_nll[-1] for arm in theirs))
    if at is None:
        return None, -overhead / base_seconds
    seconds = overhead + interpolate(steps, _mean(ours, "seconds"), at)
    return at / theirs[0].steps[-1], 1 - seconds / base_seconds


def _overhead(arm: StudyArm) -> float:
    return (0.0 if arm.init in DONORLESS else arm.overhead_seconds) + (arm.start_seconds or 0.0)


def _mean(arms: Sequence[StudyArm], column: str) -> Numbers:
    """A curve, mean over seeds; an arm that ended early stays where it ended."""
    curves: list[Numbers] = [getattr(arm, column) for arm in arms]
    longest = max(map(len, curves))
    if column == "steps":
        return max(curves, key=len)
    return tuple(fmean(curve[min(place, len(curve) - 1)] for curve in curves) for place in range(longest))


def _by_paper(arms: Sequence[StudyArm]) -> dict[str, PaperFigures]:
    """The paper's start and ours, seed by seed and then averaged."""
    best: dict[tuple[str, int], StudyArm] = {}
    for arm in (arm for arm in arms if arm.steps):
        rival = best.get((arm.init, arm.seed))
        if rival is None or arm.validation_token_accuracy[-1] > rival.validation_token_accuracy[-1]:
            best[arm.init, arm.seed] = arm
    found: dict[str, list[PaperFigures]] = {}
    for (init, seed), arm in best.items():
        if base := best.get(("base", seed)):
            found.setdefault(init, []).append(_paper_figures(arm, base))
    return {init: _paper_mean(seeds) for init, seeds in found.items()}


def _paper_figures(arm: StudyArm, base: StudyArm) -> PaperFigures:
    final = arm.validation_token_accuracy[-1]
    if arm.init == "base":
        return PaperFigures(final, 1.0, 1.0, 1.0)
    parity = parity_by_accuracy(arm.steps, arm.validation_token_accuracy, base.validation_token_accuracy[-1])
    trained, whole = parity * arm.seconds[-1], base.seconds[-1]
    charged = 0.0 if arm.init in DONORLESS else arm.charged_seconds
    time = None if charged is None else (charged + trained) / whole
    return PaperFigures(final, parity, time, (_overhead(arm) + trained) / whole)


def _paper_mean(seeds: Sequence[PaperFigures]) -> PaperFigures:
    times = [one.time for one in seeds if one.time is not None]
    return PaperFigures(
        fmean(one.accuracy for one in seeds),
        fmean(one.parity for one in seeds),
        fmean(times) if len(times) == len(seeds) else None,
        fmean(one.time_all for one in seeds),
    )


def _is_worse(ours: float, base: float, rows: int) -> bool:
    noise = 2 * (max(ours * (1 - ours) + base * (1 - base), 1 / rows) / rows) ** 0.5
    return ours < base - noise
