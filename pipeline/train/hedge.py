"""A hedge: base and mashup are trained to a third of the steps, then the start of the higher validation loss is stopped and the
other goes on to the end. So the better of the two costs at most a third more than one finetune.

In the study (benchmarks/results/study.png) the sign of mashup minus base after a third of the steps, between two evaluations, was
that at the end on all eight tasks.

The decision is a file beside the arms: Ray Tune's scheduler writes it when the last arm has come to that step. Arms that have a
place beside each other wait for it there; where there is no room for all, each gives up its place, and those that win go on from
their checkpoints. Knows no Ray.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.train.arm import HELD_FILE, RESULT_FILE, Job

STARTS = ("base", "mashup")
LEAST_WAIT = 60.0
"""Seconds that an arm waits for one beside it at least; otherwise as long as it took to come to the step."""

Json = Mapping[str, Any]


def decision_step(steps: int) -> int:
    """The step after which it is decided: with it, the one that is stopped has cost at most a third."""
    return steps // 3


def decide(nll: Mapping[str, Sequence[float]], step: int) -> dict[str, Any]:
    """Which start goes on: the one of the lower validation NLL, each at its best learning rate. Where they are equal, the base.

    Args:
        nll: for each of STARTS the validation NLL of its arms after `step` steps; not finite where training diverged before.

    Returns:
        The step, `winner` and `stopped`, and the NLL of each start; None: all its arms diverged.
    """
    lowest = {init: min((one for one in nll[init] if math.isfinite(one)), default=math.inf) for init in STARTS}
    winner, stopped = ("mashup", "base") if lowest["mashup"] < lowest["base"] else ("base", "mashup")
    return {
        "step": step,
        "winner": winner,
        "stopped": stopped,
        "validation_nll": {init: one if math.isfinite(one) else None for init, one in lowest.items()},
    }


def cost(outcomes: Sequence[Json], decision: Json) -> dict[str, dict[str, float]]:
    """Steps, padded tokens and training seconds of all arms (`spent`), and of the start that went on alone (`plain`), which a
    finetune without a hedge would have cost.

    Args:
        outcomes: of all arms; see `ray_train.fit`.
    """
    alone = [outcome for outcome in outcomes if outcome["init"] == decision["winner"]]
    return {
        unit: {"spent": _sum(outcomes, unit), "plain": _sum(alone, unit), "more": _sum(outcomes, unit) / _sum(alone, unit) - 1}
        for unit in ("step", "tokens", "seconds")
    }


class Hedge:
    """The arms of a hedge, and what is known of them; `step` is that of the decision, `storage` the folder of all arms."""

    def __init__(self, jobs: Sequence[Job], storage: Folder, step: int, say: Callable[[str], None] = lambda text: None) -> None:
        self._jobs, self._storage, self.step, self._say = {job.name: job for job in jobs}, storage, step, say
        self.file = f"hedge-{digest(sorted(self._jobs))}.json"
        self._nll: dict[str, float] = {}

    @property
    def decision(self) -> dict[str, Any] | None:
        """As `decide` gives it; None: it is not made yet."""
        return _read(self._storage, self.file)

    def note(self, name: str, nll: float) -> None:
        """Take down the validation NLL of an arm at the step; the last one brings the decision."""
        self._nll[name] = nll
        if len(self._nll) < len(self._jobs) or self.decision:
            return
        by_start = {init: [self._nll[name] for name, job in self._jobs.items() if job.arm.init == init] for init in STARTS}
        decision = decide(by_start, self.step)
        self._storage.write_json(self.file, decision)
        self._say(f"after step {self.step}: the {decision['winner']} goes on, the {decision['stopped']} is stopped")

    def look(self) -> None:
        """Take down what arms have left that are at the step, or at their end."""
        for name in self._jobs.keys() - self._nll.keys():
            if outcome := self._left_by(name):
                rows = (row for row in outcome["curve"] if row["step"] == self.step and outcome["diverged_at"] is None)
                self.note(name, next((row["eval_nll"] for row in rows), math.inf))

    def has_ended(self, job: Job) -> bool:
        """Whether nothing of an arm is left to train, as far as it is known."""
        if self._storage.is_complete(f"{job.name}/{RESULT_FILE}"):
            return True
        decision = self.decision
        held = self._storage.is_complete(f"{job.name}/{HELD_FILE}")
        return held and (decision is None or decision["stopped"] == job.arm.init)

    def outcome(self, job: Job) -> dict[str, Any]:
        """What came of an arm that has ended, with `stopped_at` where it was stopped."""
        return self._left_by(job.name) or {}

    def hold_of(self, job: Job, beside: bool) -> "Hold":
        """`beside`: all arms have a place at once."""
        rivals = tuple(name for name in self._jobs if name != job.name)
        return Hold(self.step, job.arm.init, self._storage, self.file, rivals, beside)

    def _left_by(self, name: str) -> dict[str, Any] | None:
        if result := _read(self._storage, f"{name}/{RESULT_FILE}"):
            return result
        held = _read(self._storage, f"{name}/{HELD_FILE}")
        return held and held | {"stopped_at": self.step}


@dataclass(frozen=True)
class Hold:
    """What an arm must know to wait for the decision at `step`; it travels to the training workers."""

    step: int
    init: str
    storage: Folder
    file: str
    rivals: tuple[str, ...]
    beside: bool


class Wait:
    """Of one attempt at an arm: asked at the step of the decision, again and again, whether it goes on."""

    def __init__(self, hold: Hold, now: Callable[[], float] = time.monotonic) -> None:
        self._hold, self._now, self._began = hold, now, now()
        self._came: float | None = None

    @property
    def step(self) -> int:
        return self._hold.step

    def __call__(self) -> bool | None:
        """True: it goes on. False: it ends here, as it was stopped, or as its place is needed. None: not known yet, ask again."""
        hold = self._hold
        if decision := _read(hold.storage, hold.file):
            return bool(decision["winner"] == hold.init)
        self._came = self._came or self._now()
        patient = hold.beside or self._rivals_came()
        return None if patient and self._now() - self._came < max(LEAST_WAIT, self._came - self._began) else False

    def _rivals_came(self) -> bool:
        files = ([f"{name}/{file}" for file in (RESULT_FILE, HELD_FILE)] for name in self._hold.rivals)
        return all(any(map(self._hold.storage.is_complete, either)) for either in files)


def _read(storage: Folder, name: str) -> dict[str, Any] | None:
    return dict(storage.read_json(name)) if storage.is_complete(name) else None


def _sum(outcomes: Sequence[Json], unit: str) -> float:
    return float(sum(outcome["curve"][-1][unit] for outcome in outcomes))
