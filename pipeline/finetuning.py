"""The training loop of one worker: LoRA on a frozen base, or all weights; AdamW without weight decay, 5 % linear warm-up and a
cosine to zero, gradients clipped at norm 1.

The loss is the mean NLL over the learned tokens of the global batch, whatever the number of workers. The order of the rows is a
function of seed and step alone, so that a run that resumes from a checkpoint goes on as if nothing had happened. Knows no Ray.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from pipeline.arms import CURVE_FILE, STATE_FILE, Job
from pipeline.basemodel import device, fast_dtype, linear_shapes, load_model, load_tokenizer
from pipeline.engines.completion import Batch, collate, completion_logits, completion_targets, length_batches, score_tokens
from pipeline.fetch import fetch_adapter
from pipeline.merge.adapter import CONFIG_FILE, Adapter, read_adapter, write_adapter
from pipeline.merge.recipes import Recipe, merge
from pipeline.storage import Folder
from pipeline.tables import SAMPLES

EVALUATION_TOKENS = 2048
"""Padded tokens in one forward pass of an evaluation."""

WARMUP = 0.05
Report = Callable[[dict[str, Any], Path | None], None]
FRESH = "fresh"
"""In a checkpoint of a folded start: what was trained; beside it stands its exact sum with the start, for the base as it was."""


def batch_places(step: int, batch_size: int, n_rows: int, seed: int) -> list[int]:
    """Rows of the global batch of a step (counted from 0): each epoch is a permutation of its own, drawn from the seed."""
    places: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n_rows)
        places.append(int(_permutation(seed, epoch, n_rows)[offset]))
    return places


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Steps after which the model is evaluated: the start, and evenly on to the last step."""
    times = min(evaluations, steps)
    return sorted({round(number * steps / times) for number in range(times + 1)})


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

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        logits_NV = completion_logits(causal(self.model), batch)
        return nn.functional.cross_entropy(logits_NV, completion_targets(batch), reduction="sum")


def causal(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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
        with _start(job) as start:
            self.start = read_adapter(start) if start and job.folded and not job.full else None
            self.model = _trainable(job, start)
        self.precision = torch.autocast(device().type, fast_dtype(job.train.dtype), enabled=_mixed(job))
        loss = CompletionLoss(self.model)
        self.loss = DistributedDataParallel(loss) if self.world > 1 else loss
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=job.arm.lr, weight_decay=0.0)
        steps = job.train.steps
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, math.ceil(WARMUP * steps), steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.evaluating = 0.0  # seconds; checkpoints apart
        self.curve: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.startup = time.perf_counter() - started

    def run(self) -> None:
        """Train to the last step; evaluate, checkpoint and report on the way."""
        stops = evaluation_steps(self.job.last_step or self.job.train.steps, self.job.train.evaluations)
        if not self.curve:
            self._evaluate(train_nll=float("nan"))
        for stop in [stop for stop in stops if stop > self.step]:
            if self.diverged_at is not None or self._stalled():
                return
            started = time.perf_counter()
            losses = list(self._advance(stop))
            self.seconds += time.perf_counter() - started
            self._evaluate(train_nll=sum(losses) / max(1, len(losses)))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that `_save` wrote."""
        if self.job.full:
            self.model.load_state_dict(load_model(str(folder), torch.float32).state_dict())
        else:
            trained = folder / FRESH if self.start else folder
            self.model.load_adapter(str(trained), adapter_name="default", is_trainable=True)
        state = torch.load(folder / STATE_FILE, weights_only=True)
        outcome = json.loads((folder / CURVE_FILE).read_text())
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.tokens, self.seconds = state["progress"]
        self.curve, self.diverged_at = outcome["curve"], outcome["diverged_at"]
        self.evaluating = outcome["evaluation_seconds"]

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

    def _stalled(self) -> bool:
        """Whether patience is at an end: the last evaluations have not gone below the lowest loss before them."""
        patience, losses = self.job.train.patience, [point["eval_nll"] for point in self.curve]
        if self.arm.init == "base" or not 0 < patience < len(losses):
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    def _train_step(self) -> float:
        train = self.job.train
        places = batch_places(self.step, train.batch_size, len(self.rows["train"]), self.arm.seed)
        batch = self.rows["train"].batch(places[self.rank :: self.world] or places[:1])
        idle = self.rank >= len(places)  # more workers than rows: takes part with nothing to add
        counts = self._sum(torch.tensor([0 if idle else batch.n_tokens, 0 if idle else batch.ids_BT.numel()]).double())
        n_learned = float(counts[0])
        with self.precision:
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
        started = time.perf_counter()
        self.model.eval()
        rows = self.rows["validation"]
        with self.precision:
            sums = evaluate(causal(self.model), rows, range(self.rank, len(rows), self.world))
        metrics = as_metrics(self._sum(sums))
        self.evaluating += time.perf_counter() - started
        point = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "train_nll": train_nll, **metrics}
        self.curve.append({"init": self.arm.init, "lr": self.arm.lr, "seed": self.arm.seed, **point})
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                self._save(Path(folder))
            self.report(point, Path(folder) if self.rank == 0 else None)

    def _save(self, folder: Path) -> None:
        if self.start:
            self.model.save_pretrained(str(folder / FRESH))
            write_adapter(folder, _on_top(self.job.base, self.start, read_adapter(folder / FRESH)))
        else:
            self.model.save_pretrained(str(folder))
        if self.job.full:
            load_tokenizer(self.job.base).save_pretrained(str(folder))
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, folder / STATE_FILE)
        times = {"startup_seconds": self.startup, "evaluation_seconds": self.evaluating}
        outcome = {"curve": self.curve, "diverged_at": self.diverged_at, **times}
        (folder / CURVE_FILE).write_text(json.dumps(outcome))

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all workers."""
        if self.world == 1:
            return values
        shared = values.to(device())
        dist.all_reduce(shared)
        return shared.cpu()


def evaluate_on_test(base: str, dtype: str, data: Folder, checkpoints: dict[str, Folder]) -> dict[str, dict[str, float]]:
    """Metrics on the test split of each of several checkpoints. Runs as one Ray task."""
    rows = Rows(data.read_table("test.parquet"))
    found: dict[str, dict[str, float]] = {}
    for name, checkpoint in checkpoints.items():
        model = _load_checkpoint(base, fast_dtype(dtype), checkpoint)
        metrics = as_metrics(evaluate(model, rows, range(len(rows))))
        found[name] = {key.replace("eval_", "test_"): value for key, value in metrics.items()}
    return found


def _load_checkpoint(base: str, dtype: torch.dtype, checkpoint: Folder) -> Any:
    """A whole model, or the base with an adapter."""
    with tempfile.TemporaryDirectory() as cache:
        if checkpoint.exists(CONFIG_FILE):
            return causal(
                PeftModel.from_pretrained(load_model(base, dtype), str(fetch_adapter(checkpoint.uri, Path(cache)))).eval()
            )
        checkpoint.download([name for name in checkpoint.list_files() if name != STATE_FILE], Path(cache))
        return load_model(cache, dtype)


@contextmanager
def _start(job: Job) -> Iterator[Path | None]:
    """The local folder of the adapter to start from; None: from the base."""
    with tempfile.TemporaryDirectory() as cache:
        yield None if job.arm.init == "base" else fetch_adapter(job.start.uri, Path(cache))


def _trainable(job: Job, start: Path | None) -> Any:
    """The model with what is trained of it, from the base or from the adapter at `start`."""
    model = load_model(job.base, torch.float32 if job.full else fast_dtype(job.train.dtype))
    if start and not job.folded:
        return PeftModel.from_pretrained(model, str(start), is_trainable=True)
    if start:
        model = PeftModel.from_pretrained(model, str(start)).merge_and_unload()
    if job.full:
        return model.requires_grad_(True)
    fresh = LoraConfig(
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        target_modules=list(job.lora.target_modules),
        base_model_name_or_path=job.base,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, fresh)


def _mixed(job: Job) -> bool:
    """Whether all weights are trained in float32 and multiplied in a shorter type."""
    return job.full and fast_dtype(job.train.dtype) != torch.float32


def _on_top(base: str, start: Adapter, fresh: Adapter) -> Adapter:
    """The exact sum of the two as one adapter."""
    recipe = Recipe(("start", "fresh"), (1.0, 1.0), "concat", start.max_rank + fresh.max_rank)
    return merge(recipe, [start, fresh], base, linear_shapes(base)[0]).adapter


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)
