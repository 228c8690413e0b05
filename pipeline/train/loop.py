"""The training loop of one worker: AdamW without weight decay, a linear warm-up, a cosine to zero, gradients clipped at norm 1.

The loss is the mean NLL over the learned tokens of the global batch, whatever the number of workers and of passes that the batch
is computed in. A run that resumes from a checkpoint goes on as if nothing had happened. Knows no Ray.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from pipeline.core.errors import PassTooLargeError
from pipeline.model.base_model import device
from pipeline.model.completion_loss import collate
from pipeline.train.arm import CURVE_FILE, STATE, Job
from pipeline.train.batches import Share, halved
from pipeline.train.evaluate import Rows, as_metrics, evaluate, least_over_workers, sum_over_workers
from pipeline.train.feed import StepFeed
from pipeline.train.hedge import Wait
from pipeline.train.passes import choose_tokens
from pipeline.train.profiler import traced
from pipeline.train.worker_model import Trainable

ASKED_EVERY = 0.5
"""Seconds between two looks for a decision that is waited for."""
DIVERGED = "diverged"
"""Among the metrics of the evaluation at which an arm ends because of that."""
Write = Callable[[Path], None]
"""Writes a checkpoint to a folder."""

Report = Callable[[dict[str, Any], Callable[[], Write | None]], None]
"""Takes the metrics of an evaluation, and what copies this worker's share of a checkpoint, to be written at any time after (None:
it has none). All workers call it, or none."""

Feed = Callable[[Share, int, int], Iterator[dict[str, Any]]]
"""A share, the first step and the one after the last -> this worker's steps, schema `batches.STEP`."""


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Steps after which the model is evaluated: the start, and evenly on to the last step."""
    times = min(evaluations, steps)
    return sorted({round(number * steps / times) for number in range(times + 1)})


class Finetuning:
    """One worker's share of an arm. `feed` gives the steps; `sizes` are those of an attempt that a PassTooLargeError ended;
    `wait` is asked at its step whether the arm of a hedge goes on."""

    def __init__(
        self,
        job: Job,
        rank: int,
        workers: int,
        report: Report,
        feed: Feed | None = None,
        sizes: Sequence[int] = (),
        wait: Wait | None = None,
    ) -> None:
        started = time.perf_counter()
        self.job, self.arm, self.wait = job, job.arm, wait
        self.rank, self.workers, self.report = rank, workers, report
        self.sizes = list(sizes)  # padded tokens a pass: what was chosen, then what was taken for want of memory
        self.end = job.last_step or job.train.steps
        self.feed = feed or StepFeed(job)
        self.validation = Rows(job.data.read_table("validation.parquet"))
        self.trainable = Trainable(job, workers)
        groups = self.trainable.groups(job.arm.lr)
        self.optimizer = torch.optim.AdamW(groups, lr=job.arm.lr, weight_decay=0.0, fused=True)
        steps = job.train.steps
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, math.ceil(job.train.warmup * steps), steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.evaluating = 0.0  # seconds; checkpoints apart
        self.waiting = 0.0  # seconds of steps in which their rows were not there yet
        self.held = 0.0  # seconds of waiting for a decision
        self.told: int | None = None  # the step that was reported last, in this attempt
        self.curve: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.startup = time.perf_counter() - started

    @property
    def share(self) -> Share:
        """What tells this worker's share of every step, once it is known how large a pass may be."""
        return Share(self.job.train.batch_size, self.arm.seed, self.rank, self.workers, self.sizes[-1])

    def run(self) -> None:
        """Train to the last step; evaluate, checkpoint and report on the way.

        Raises:
            PassTooLargeError: a worker ran out of memory, and all must go on from the last checkpoint with its `sizes`.
            RuntimeError: a row alone is too long for the memory.
        """
        if not self.sizes:
            chosen = choose_tokens(self.job, self.trainable, self.validation)
            self.sizes = [least_over_workers(chosen, self.workers)]
        if not self.curve:
            self._evaluate(train_nll=float("nan"))
        started = time.perf_counter()
        self.steps = self.feed(self.share, self.step, self.end)
        self.startup += time.perf_counter() - started  # until the rows are on this node's disk
        with traced(self.job.trace, self.job.profile if self.rank == 0 else None) as tick:
            for stop in self._stops():
                if self.diverged_at is not None or self._stalled() or not self._goes_on():
                    return
                started = time.perf_counter()
                losses = list(self._advance(stop, tick))
                self.seconds += time.perf_counter() - started
                self._evaluate(train_nll=sum(losses) / max(1, len(losses)))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that workers, however many, have written to `folder`."""
        # On CPUs what is loaded is used as it is, and should not stay a file's.
        mapped = device().type != "cpu"
        state, *others = (torch.load(file, weights_only=True, mmap=mapped) for file in sorted(folder.glob(f"{STATE}-*.pt")))
        for other in others:
            state["optimizer"]["state"] |= other["optimizer"]["state"]
        outcome = json.loads((folder / CURVE_FILE).read_text())
        self.trainable.restore(state, self.optimizer, folder)
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.tokens, self.seconds = state["progress"]
        self.curve, self.diverged_at = outcome["curve"], outcome["diverged_at"]
        self.evaluating, self.waiting = outcome["evaluation_seconds"], outcome.get("waiting_seconds", 0.0)
        self.held = outcome.get("held_seconds", 0.0)
        self.sizes = max(self.sizes, outcome.get("tokens_per_pass", []), key=len)  # an older checkpoint has none

    def _advance(self, stop: int, tick: Callable[[], None]) -> Iterator[float]:
        """Train up to `stop`; yields the mean NLL a learned token of each global batch. Ends early where it diverges."""
        while self.step < stop:
            started = time.perf_counter()
            step = next(self.steps)
            self.waiting += time.perf_counter() - started
            nll = self._train_step(step)
            if nll is None:
                continue  # the same step comes again, in smaller passes
            self.step += 1
            tick()
            if not math.isfinite(nll):
                self.diverged_at = self.step
                return
            yield nll

    def _stops(self) -> list[int]:
        """Steps to come after which the model is evaluated."""
        stops = {*evaluation_steps(self.end, self.job.train.evaluations), *([self.wait.step] if self.wait else [])}
        return sorted(stop for stop in stops if stop > self.step)

    def _goes_on(self) -> bool:
        """Whether training goes on from here: not where a hedge has stopped this start. Waits until that is known; all workers
        must call it."""
        if not self.wait or self.step != self.wait.step:
            return True
        if self.told != self.step:  # whoever decides has not heard of an attempt that begins here
            self.report(self.curve[-1], lambda: None)
        started = time.perf_counter()
        while not (answer := self._answer()):
            time.sleep(ASKED_EVERY)
        self.held += time.perf_counter() - started
        return answer > 0

    def _answer(self) -> int:
        """What the first worker was told: 1 go on, -1 end here, 0 not known yet."""
        said = self.wait() if self.wait and self.rank == 0 else None
        own = torch.tensor([0 if said is None else 1 if said else -1], dtype=torch.float64)
        return int(sum_over_workers(own, self.workers))

    def _stalled(self) -> bool:
        """Whether patience is at an end: the last evaluations have not gone below the lowest loss before them. A hedge has none
        before its decision, and then for the base, too."""
        patience, losses = self.job.train.patience, [point["eval_nll"] for point in self.curve]
        lasts = self.step <= self.wait.step if self.wait else self.arm.init == "base"
        if lasts or not 0 < patience < len(losses):
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    def _train_step(self, step: dict[str, Any]) -> float | None:
        """The mean NLL a learned token of the global batch. Where it is not finite, the weights stay as they are. None: a worker
        ran out of memory, and nothing has changed but the size of the passes to come."""
        assert step["number"] == self.step
        sums, smaller = self._add_gradients(step)
        nll, out_of_memory = sum_over_workers(sums, self.workers).tolist()  # the one time in a step that the device is waited for
        if out_of_memory:
            self._take_smaller_passes(smaller)
            return None
        nll /= step["n_learned"]
        if math.isfinite(nll):
            self.trainable.average_gradients()
            torch.nn.utils.clip_grad_norm_(self.trainable.weights, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.tokens += step["n_padded"]
        self.optimizer.zero_grad(set_to_none=True)
        return float(nll)

    def _add_gradients(self, step: dict[str, Any]) -> tuple[Tensor, int]:
        """Compute this worker's passes of a step.

        Returns:
            Its summed NLL and whether it ran out of memory, 0 or 1; float64, shape (2,), on the device. And how many tokens of a
            pass its memory holds.
        """
        sums, failed = torch.zeros(2, dtype=torch.float64, device=device()), False
        try:
            for rows in step["passes"]:
                sums[0] += self._pass(rows, step["n_learned"])
        except torch.OutOfMemoryError:
            failed = True
        # The error is gone by now, and with it what it held of the pass.
        smaller = halved(step["passes"]) if failed else self.sizes[-1]
        if failed and self.job.train.shard:  # the others wait in the midst of a layer
            raise PassTooLargeError([*self.sizes, _fitting(smaller)])
        sums[1] = failed
        return sums, smaller

    def _pass(self, rows: list[dict[str, Any]], n_learned: int) -> Tensor:
        """Add the gradients of some rows; their summed NLL, on the device."""
        batch = collate([row["ids"] for row in rows], [row["learn"] for row in rows], device())
        loss = self.trainable.loss(batch)
        # Gradients are averaged over workers; the loss is a mean over the tokens of all of them.
        (loss * self.workers / n_learned).backward()
        return loss.detach()

    def _take_smaller_passes(self, smaller: int) -> None:
        """Do without a step's gradients and go on as the worker with the least memory can."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        self.sizes.append(_fitting(least_over_workers(smaller, self.workers)))
        self.steps = self.feed(self.share, self.step, self.end)

    def _evaluate(self, train_nll: float) -> None:
        started = time.perf_counter()
        sums = evaluate(self.trainable.score, self.validation, self.rank, self.workers)
        metrics = as_metrics(sum_over_workers(sums, self.workers))
        self.evaluating += time.perf_counter() - started
        point = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "train_nll": train_nll, **metrics}
        self.curve.append({"init": self.arm.init, "lr": self.arm.lr, "seed": self.arm.seed, **point})
        self.told = self.step
        self.report(point if self.diverged_at is None else point | {DIVERGED: True}, self._snapshot)

    def _snapshot(self) -> Write | None:
        """Copy this worker's share of a checkpoint: the first has all but the optimizer's state of a full finetune."""
        trained = self.trainable.trained(self.rank)
        moments = self.trainable.moments(self.optimizer, self.rank)
        if self.rank == 0:
            weights = {} if self.job.full else trained
            progress = (self.step, self.tokens, self.seconds)
            state = {"optimizer": moments, "weights": weights, "schedule": self.schedule.state_dict(), "progress": progress}
            times = {"startup_seconds": self.startup, "evaluation_seconds": self.evaluating, "waiting_seconds": self.waiting}
            times |= {"held_seconds": self.held} if self.wait else {}
            sizes = {"tokens_per_pass": list(self.sizes)}
            outcome = {"curve": list(self.curve), "diverged_at": self.diverged_at, **sizes, **times}
            return partial(self._write, trained, outcome, state)
        return partial(self._write_state, {"optimizer": moments}) if moments["state"] else None

    def _write(self, trained: dict[str, Any], outcome: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
        self.trainable.save(folder, trained)
        (folder / CURVE_FILE).write_text(json.dumps(outcome))
        self._write_state(state, folder)

    def _write_state(self, state: dict[str, Any], folder: Path) -> None:
        torch.save(state, folder / f"{STATE}-{self.rank}.pt")


def _fitting(tokens: int) -> int:
    """The size of a pass that is smaller than one which did not fit.

    Raises:
        RuntimeError: there is none.
    """
    if not tokens:
        raise RuntimeError(
            "a single row does not fit the device's memory beside the model; use train.gradient_checkpointing, train.shard with "
            "several workers, or a smaller target.max_tokens"
        )
    return tokens
