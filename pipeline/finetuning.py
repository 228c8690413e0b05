"""The training loop of one worker: LoRA on a frozen base, AdamW without weight decay, 5 % linear warm-up and a cosine to zero,
gradients clipped at norm 1.

The loss is the mean NLL over the learned tokens of the global batch, whatever the number of workers. The order of the rows is a
function of seed and step alone, so that a run that resumes from a checkpoint goes on as if nothing had happened. Knows no Ray.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

from pipeline.arms import CURVE_FILE, Job
from pipeline.basemodel import device, fast_dtype, load_model
from pipeline.engines.completion import Batch, collate, completion_logits, completion_targets, length_batches, score_tokens
from pipeline.fetch import fetch_adapter
from pipeline.storage import Folder
from pipeline.tables import SAMPLES

EVALUATION_TOKENS = 2048
"""Padded tokens in one forward pass of an evaluation."""

WARMUP = 0.05
Report = Callable[[dict[str, Any], Path | None], None]
STATE_FILE = "trainer_state.pt"


def batch_places(step: int, batch_size: int, n_rows: int, seed: int) -> list[int]:
    """Rows of the global batch of a step (counted from 0): each epoch is a permutation of its own, drawn from the seed."""
    places: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n_rows)
        places.append(int(_permutation(seed, epoch, n_rows)[offset]))
    return places


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Steps after which the model is evaluated: the start, and evenly on to the last step."""
    return sorted({round(number * steps / evaluations) for number in range(evaluations + 1)})


class Rows:
    """A training split in memory."""

    def __init__(self, table: pa.Table):
        self.ids: list[list[int]] = table["input_ids"].to_pylist()
        self.completion: list[list[bool]] = table["completion_mask"].to_pylist()
        self.learn: list[list[bool]] = table["learn_mask"].to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, places: Sequence[int]) -> Batch:
        return collate([self.ids[p] for p in places], [self.learn[p] for p in places], device())


def evaluate(model: Any, rows: Rows, places: Sequence[int]) -> Tensor:
    """Sums over the rows `places`: NLL and number of completion tokens, how many were first choice, rows, exact matches.

    A row matches exactly if every token of its completion and its end of turn is the model's first choice given the true
    tokens before it. Greedy decoding then writes exactly these tokens, and otherwise leaves them at the first miss.

    Returns:
        float64, shape (5,).
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for group in length_batches([len(rows.ids[p]) for p in places], EVALUATION_TOKENS):
        chosen = [places[g] for g in group]
        batch = rows.batch(chosen)
        nll_N, hit_N = score_tokens(model, batch)
        counted_BT = collate([rows.ids[p] for p in chosen], [rows.completion[p] for p in chosen], device()).mask_BT
        counted_N = counted_BT[:, 1:][batch.mask_BT[:, 1:]]
        misses_B = torch.zeros(len(chosen), device=hit_N.device).index_add(0, batch.row_N, (~hit_N).float())
        sums += torch.tensor(
            [nll_N[counted_N].sum(), counted_N.sum(), hit_N[counted_N].sum(), len(chosen), (misses_B == 0).sum()],
            dtype=torch.float64,
        )
    return sums


def as_metrics(sums: Tensor) -> dict[str, float]:
    """NLL (infinite where it is NaN) and accuracy a completion token, and the share of rows that match exactly, from the sums
    of `evaluate`."""
    nll, tokens, hits, rows, exact = sums.tolist()
    return {
        "eval_nll": nll / tokens if math.isfinite(nll) else math.inf,
        "eval_token_accuracy": hits / tokens,
        "eval_exact_match": exact / rows,
    }


class CompletionLoss(nn.Module):
    """A causal LM as a module whose forward is the summed NLL of the learned tokens, for DDP to wrap."""

    def __init__(self, model: PeftModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        logits_NV = completion_logits(self.model.get_base_model(), batch)
        return nn.functional.cross_entropy(logits_NV, completion_targets(batch), reduction="sum")


class Finetuning:
    """One worker's share of an arm. Knows no Ray: `report` takes the metrics of each evaluation and, from the first worker, a
    folder with the checkpoint."""

    def __init__(self, job: Job, rank: int, world: int, report: Report):
        started = time.perf_counter()
        self.job, self.arm = job, job.arm
        self.rank, self.world, self.report = rank, world, report
        self.rows = {
            split: Rows(job.data.read_table(f"{split}.parquet").select(SAMPLES.names)) for split in ("train", "validation")
        }
        torch.manual_seed(job.arm.seed)
        self.model = _adapted(job)
        loss = CompletionLoss(self.model)
        self.loss = DistributedDataParallel(loss) if self.world > 1 else loss
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=job.arm.lr, weight_decay=0.0)
        steps = job.train.steps
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, math.ceil(WARMUP * steps), steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.startup = time.perf_counter() - started

    def run(self) -> None:
        """Train to the last step; evaluate, checkpoint and report on the way."""
        stops = evaluation_steps(self.job.train.steps, self.job.train.evaluations)
        if not self.curve:
            self._evaluate(train_nll=float("nan"))
        for stop in [stop for stop in stops if stop > self.step]:
            if self.diverged_at is not None:
                return
            started = time.perf_counter()
            losses = list(self._advance(stop))
            self.seconds += time.perf_counter() - started
            self._evaluate(train_nll=sum(losses) / max(1, len(losses)))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that `_save` wrote."""
        self.model.load_adapter(str(folder), adapter_name="default", is_trainable=True)
        state = torch.load(folder / STATE_FILE, weights_only=True)
        outcome = json.loads((folder / CURVE_FILE).read_text())
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.tokens, self.seconds = state["progress"]
        self.curve, self.diverged_at = outcome["curve"], outcome["diverged_at"]

    def _advance(self, stop: int) -> Iterator[float]:
        """Train up to `stop`; yields the mean NLL a learned token of each global batch. Ends early where it diverges."""
        self.model.train()
        while self.step < stop:
            nll = self._train_step()
            self.step += 1
            if not math.isfinite(nll):
                self.diverged_at = self.step
                return
            yield nll

    def _train_step(self) -> float:
        train = self.job.train
        places = batch_places(self.step, train.batch_size, len(self.rows["train"]), self.arm.seed)
        batch = self.rows["train"].batch(places[self.rank :: self.world] or places[:1])
        idle = self.rank >= len(places)  # more workers than rows: takes part with nothing to add
        counts = self._sum(torch.tensor([0 if idle else batch.n_tokens, 0 if idle else batch.ids_BT.numel()]).double())
        n_learned = float(counts[0])
        loss = self.loss(batch) * (0.0 if idle else 1.0)
        nll = float(self._sum(loss.detach().double().cpu().reshape(1))[0]) / n_learned
        if not math.isfinite(nll):
            return nll
        # DDP averages gradients over workers; the loss is a mean over the tokens of all of them.
        (loss * self.world / n_learned).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += int(counts[1])
        return nll

    def _evaluate(self, train_nll: float) -> None:
        self.model.eval()
        rows = self.rows["validation"]
        metrics = as_metrics(self._sum(evaluate(self.model.get_base_model(), rows, range(self.rank, len(rows), self.world))))
        point = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "train_nll": train_nll, **metrics}
        self.curve.append({"init": self.arm.init, "lr": self.arm.lr, "seed": self.arm.seed, **point})
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                self._save(Path(folder))
            self.report(point, Path(folder) if self.rank == 0 else None)

    def _save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, folder / STATE_FILE)
        outcome = {"curve": self.curve, "diverged_at": self.diverged_at, "startup_seconds": self.startup}
        (folder / CURVE_FILE).write_text(json.dumps(outcome))

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all workers."""
        if self.world == 1:
            return values
        shared = values.to(device())
        dist.all_reduce(shared)
        return shared.cpu()


def evaluate_on_test(base: str, dtype: str, data: Folder, checkpoints: dict[str, Folder]) -> dict[str, dict[str, float]]:
    """Metrics on the test split of the base with each of several adapters. Runs as one Ray task."""
    rows = Rows(data.read_table("test.parquet"))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, checkpoint in checkpoints.items():
            model = load_model(base, fast_dtype(dtype))
            adapted = PeftModel.from_pretrained(model, str(fetch_adapter(checkpoint.uri, Path(cache)))).eval()
            metrics = as_metrics(evaluate(adapted.get_base_model(), rows, range(len(rows))))
            found[name] = {key.replace("eval_", "test_"): value for key, value in metrics.items()}
    return found


def _adapted(job: Job) -> PeftModel:
    model = load_model(job.base, fast_dtype(job.train.dtype))
    if job.arm.init == "base":
        fresh = LoraConfig(
            r=job.lora.rank,
            lora_alpha=job.lora.alpha,
            target_modules=list(job.lora.target_modules),
            base_model_name_or_path=job.base,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, fresh)
    with tempfile.TemporaryDirectory() as cache:
        return PeftModel.from_pretrained(model, str(fetch_adapter(job.start.uri, Path(cache))), is_trainable=True)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)
