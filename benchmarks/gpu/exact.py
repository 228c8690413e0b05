"""Stage A, what must come out the same: our losses and gradients beside plain transformers' and PEFT's, a run that resumes beside
one that does not, one worker that holds all shares beside one without FSDP2, merges on the device beside those on a CPU."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.gpu.checks import Check, Setting, WrongError, within
from benchmarks.gpu.models import LINEAR, draw_rows, flat_gradient, make_model, mask_of, saved_base, shape_of, write_splits
from pipeline.config import TrainConfig
from pipeline.model.completion_loss import Batch, collate, completion_nll
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.fused_lora import fuse
from pipeline.train.loop import Finetuning

FLOAT32 = 1e-3
"""The largest `Computed.errors` in float32."""

TIMES_PLAIN, ROUNDING = 2.0, 1e-3
"""In bfloat16 our errors may be so many times those of plain transformers or PEFT in bfloat16, and so much more."""

TIMES_NOISE, CURVE = 10.0, 1e-4
"""A resumed curve may differ from an undisturbed one, in nats, by so many times what two undisturbed ones differ, or by this."""

SHARED_OUT = 1e-2
"""Nats by which a curve under FSDP2 may differ from one without."""


@dataclass(frozen=True)
class Computed:
    """Of a pass: -log p of each token that counts, and the gradient of their mean in all weights that are trained."""

    nll_N: Tensor
    gradient: Tensor

    def errors(self, exact: "Computed") -> dict[str, float]:
        """The root mean square difference of a token's NLL in nats, and that of the gradient relative to its norm."""
        difference = (self.gradient - exact.gradient).norm() / exact.gradient.norm()
        return {"nll": float((self.nll_N - exact.nll_N).square().mean().sqrt()), "gradient": float(difference)}


def completions_float32(setting: Setting) -> dict[str, Any]:
    """NLL and gradients of our pass, the beginning of the rows shared or not, are plain transformers'."""
    return _completions(setting, torch.float32)


def completions_bfloat16(setting: Setting) -> dict[str, Any]:
    return _completions(setting, torch.bfloat16)


def fused_lora_float32(setting: Setting) -> dict[str, Any]:
    """The fused LoRA layer gives PEFT's values and gradients."""
    return _fused_lora(setting, torch.float32)


def fused_lora_bfloat16(setting: Setting) -> dict[str, Any]:
    return _fused_lora(setting, torch.bfloat16)


def resumed_adapter(setting: Setting) -> dict[str, Any]:
    """A finetune that goes on from a checkpoint has the curve of one that was not disturbed."""
    return _resumed(setting, "lora")


def resumed_all_weights(setting: Setting) -> dict[str, Any]:
    return _resumed(setting, "full")


def one_worker_sharded(setting: Setting) -> dict[str, Any]:
    """`shard: true` with a single worker, over NCCL or gloo, trains as without."""
    plain = Finetuning(_job(setting, "lora"), 0, 1, _nothing)
    plain.run()
    backend = "gloo" if setting.tiny else "nccl"
    with patch.dict(os.environ, LOCAL_RANK="0"):  # left behind, transformers' Trainer would take it for a launcher's
        dist.init_process_group(backend, init_method=f"file://{setting.scratch}/process-group", rank=0, world_size=1)
        try:
            sharded = Finetuning(_job(setting, "lora", shard=True), 0, 1, _nothing)
            sharded.run()
        finally:
            dist.destroy_process_group()
    return within({"backend": backend, "curve": _apart(sharded, plain)}, {"curve": SHARED_OUT})


def _completions(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    shape = shape_of(setting, "135M")
    alike, longer, learned = (32, (16, 17, 20, 24), 12) if setting.tiny else (1024, (64, 96, 128, 160, 192, 256, 300, 333), 32)
    rows = draw_rows([alike + more for more in longer], learned, shape.vocabulary, alike)
    batch = collate(rows["input_ids"].to_pylist(), rows["learn_mask"].to_pylist(), torch.device(setting.device))
    model = make_model(shape, torch.bfloat16, setting.device).float()  # so that both types have the same weights
    exact = _by_row(model, batch)
    _cast(model.parameters(), dtype)
    plain = _by_row(model, batch).errors(exact)
    whole = _computed(model, lambda: completion_nll(model, replace(batch, n_shared=0)))
    passes: list[Any] = []
    counting = model.get_decoder().register_forward_hook(lambda *given: passes.append(None))
    shared = _computed(model, lambda: completion_nll(model, batch))
    counting.remove()
    if len(passes) != 2:
        raise WrongError(
            f"{batch.n_shared} tokens that {len(longer)} rows begin with took {len(passes)} passes of the model, not 2"
        )
    return _judged({"whole": whole.errors(exact), "shared": shared.errors(exact)}, plain, dtype)


def _fused_lora(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    shape = shape_of(setting, "135M")
    rows = draw_rows([24, 32] if setting.tiny else [256, 300, 384, 512], 16, shape.vocabulary)
    batch = collate(rows["input_ids"].to_pylist(), rows["learn_mask"].to_pylist(), torch.device(setting.device))
    base = make_model(shape, torch.bfloat16, setting.device).float()
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEAR), init_lora_weights=False))

    def computed() -> Computed:
        return _computed(adapted, lambda: completion_nll(adapted.get_base_model(), batch))

    exact = computed()
    _cast([weight for weight in adapted.parameters() if not weight.requires_grad], dtype)
    plain = computed().errors(exact)
    fuse(adapted)
    fused = sum("forward" in vars(module) for module in adapted.modules())
    if fused != len(LINEAR) * shape.layers:
        raise WrongError(f"{fused} of {len(LINEAR) * shape.layers} layers are fused")
    return _judged({"fused": computed().errors(exact)}, plain, dtype)


def _judged(ours: dict[str, dict[str, float]], plain: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    figures = {f"{name}_{kind}": error for name, errors in ours.items() for kind, error in errors.items()}
    limits = dict.fromkeys(figures, FLOAT32)
    if dtype != torch.float32:
        limits = {name: TIMES_PLAIN * plain[name.rpartition("_")[2]] + ROUNDING for name in figures}
        figures |= {f"plain_{kind}": error for kind, error in plain.items()}
    return within(figures, limits)


def _cast(weights: Iterable[Tensor], dtype: torch.dtype) -> None:
    """The weights alone: a model's own `to` would round the frequencies of its positions, too."""
    for weight in weights:
        weight.data = weight.data.to(dtype)


def _by_row(model: Any, batch: Batch) -> Computed:
    """Plain transformers, a row at a time without its padding."""

    def nll_N() -> Tensor:
        parts = []
        for ids_T, mask_T in zip(batch.ids_BT, mask_of(batch), strict=True):
            end = int(mask_T.nonzero().max()) + 1
            logits_TV = model(ids_T[None, :end]).logits[0, :-1].float()
            parts.append(cross_entropy(logits_TV, ids_T[1:end], reduction="none")[mask_T[1:end]])
        return torch.cat(parts)

    return _computed(model, nll_N)


def _computed(model: Any, nll: Callable[[], Tensor]) -> Computed:
    nll_N = nll()
    nll_N.mean().backward()
    return Computed(nll_N.detach(), flat_gradient(list(model.parameters())))


def _resumed(setting: Setting, method: str) -> dict[str, Any]:
    job, folder = _job(setting, method), setting.scratch / f"checkpoint-{method}"
    half = job.train.steps // 2

    def keep(metrics: dict[str, Any], snapshot: Callable[[], Callable[[Path], None] | None]) -> None:
        if metrics["step"] == half and (write := snapshot()):
            folder.mkdir()
            write(folder)

    whole, same, again = (Finetuning(job, 0, 1, report) for report in (keep, _nothing, _nothing))
    whole.run()
    same.run()
    again.restore(folder)
    begun = again.step
    again.run()
    if begun != half:
        raise WrongError(f"it went on from step {begun}, not {half}")
    noise, learned = _apart(same, whole), whole.curve[0]["eval_nll"] - whole.curve[-1]["eval_nll"]
    figures = {"curve": _apart(again, whole), "noise": noise, "learned": learned}
    return within(figures, {"curve": max(CURVE, TIMES_NOISE * noise)})


def _job(setting: Setting, method: str, **train: Any) -> Job:
    """A short finetune of the 135M shape on a few rows, fast enough that a step which is left out or doubled would be seen."""
    shape = shape_of(setting, "135M")
    lengths = [12 + number % 5 for number in range(16)] if setting.tiny else [64 + 8 * (number % 9) for number in range(32)]
    data = write_splits(setting.scratch / "rows", draw_rows(lengths, 8, shape.vocabulary))
    rate = 1e-2 if method == "lora" else 1e-3
    settings = TrainConfig(steps=8, batch_size=8, learning_rates=(rate,), evaluations=4, method=method, **train)
    return Job(Arm("base", rate, 0), saved_base(setting, "135M"), Lora(8, 16.0, LINEAR), settings, data, data, "check")


def _apart(one: Finetuning, other: Finetuning) -> float:
    """The largest difference of two curves, nats a token."""
    if len(one.curve) != len(other.curve):
        raise WrongError(f"{len(one.curve)} evaluations in place of {len(other.curve)}")
    pairs = list(zip(one.curve, other.curve, strict=True))
    validation = [abs(a["eval_nll"] - b["eval_nll"]) for a, b in pairs]
    training = [abs(a["train_nll"] - b["train_nll"]) for a, b in pairs[1:]]  # before the first step there is none
    return max(validation + training)


def _nothing(*report: Any) -> None:
    pass


CHECKS: tuple[Check, ...] = (
    completions_float32,
    completions_bfloat16,
    fused_lora_float32,
    fused_lora_bfloat16,
    resumed_adapter,
    resumed_all_weights,
    one_worker_sharded,
)
