"""Starts without donors: the ways that PEFT has of beginning a fresh adapter.

    pissa     the base's own weights, by their singular vectors (arXiv 2404.02948)
    olora     the same by their QR decomposition (2406.01775)
    corda     the same, turned to what enters each layer on the sample (2406.05223)
    lora_ga   the gradient of the base's loss on the sample, by its singular vectors (2407.05000)
    eva       A from what enters each layer on the sample, by its singular vectors; B is zero (2410.07170)

All but eva begin with a delta weight B0 A0, which is taken from the base's weights, so that the model is the base before any
step. What is written here is A0 and B0. Training (`arm.Job.moved`) takes B0 A0 from the frozen weights, and what it saves is the
plain adapter of B A - B0 A0 for the plain base, of twice the rank.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, LoraLayer, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor

from pipeline.adapters.adapter import Adapter, write_adapter
from pipeline.core.base_ref import name_of
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.model.base_model import device, fast_dtype, load_model
from pipeline.train.arm import SECONDS_FILE, Lora
from pipeline.train.batches import share_out

TOKENS = 1024
"""In one pass over a part of the sample, padding included."""

IGNORED = -100
"""The label of tokens that are not learned, as transformers has it."""

Rows = dict[str, Tensor]
"""Rows as a transformers model takes them: ids, mask and labels of shape (B, T)."""


def write_rival(init: str, base: str, dtype: str, lora: Lora, sample: pa.Table, target: Folder, seed: int = 0) -> None:
    """Make a start of this kind, and write it with the seconds that it took to `init` under `target`.

    Args:
        sample: rows of schema SAMPLES; pissa and olora read none.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    adapter = _begun(init, load_model(base, fast_dtype(dtype)), base, lora, sample)
    with temporary_folder() as scratch:
        write_adapter(scratch, adapter)
        target.upload(scratch, init)
    target.write_json(f"{init}/{SECONDS_FILE}", time.perf_counter() - started)


def _begun(init: str, model: Any, base: str, lora: Lora, sample: pa.Table) -> Adapter:
    shape: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)}
    config = LoraConfig(**shape, init_lora_weights=init, task_type="CAUSAL_LM", **_OWN.get(init, {}))
    if prepare := _PREPARE.get(init):
        prepare(model, config, sample)
    fresh = get_peft_model(model, config)
    if init == "eva":
        initialize_lora_eva_weights(fresh, list(_batches(sample)), show_progress_bar=False)
    layers = {name: module for name, module in fresh.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    factors = {
        name: tuple(half["default"].weight.detach().float().cpu() for half in (one.lora_A, one.lora_B))
        for name, one in layers.items()
    }
    # A config that names the way it began would begin so again wherever it is loaded.
    return Adapter(LoraConfig(**shape, base_model_name_or_path=name_of(base), task_type="CAUSAL_LM"), factors)


_OWN: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": EvaConfig(rho=1.0)},  # all layers of one rank, as the other arms have
    "corda": {"corda_config": CordaConfig(corda_method="ipm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}


def _prepare_corda(model: Any, config: LoraConfig, sample: pa.Table) -> None:
    with torch.no_grad():
        preprocess_corda(model, config, lambda: _run(model, _batches(sample, tokens=1)))  # it takes one row at a time


def _prepare_lora_ga(model: Any, config: LoraConfig, sample: pa.Table) -> None:
    preprocess_loraga(model, config, lambda: _run(model, _batches(sample), Tensor.backward))


_PREPARE = {"corda": _prepare_corda, "lora_ga": _prepare_lora_ga}


def _run(model: Any, batches: Iterator[Rows], then: Callable[[Tensor], Any] = lambda loss: None) -> None:
    for rows in batches:
        then(model(**rows).loss)


def _batches(sample: pa.Table, tokens: int = TOKENS) -> Iterator[Rows]:
    """The sample in batches of so many padded tokens, or of one row; learned tokens have labels."""
    ids, learned = sample["input_ids"].to_pylist(), sample["learn_mask"].to_pylist()
    for places in share_out([len(row) for row in ids], 1, tokens)[0]:
        size = len(places), max(len(ids[place]) for place in places)
        batch = {"input_ids": torch.zeros(size), "attention_mask": torch.zeros(size), "labels": torch.full(size, IGNORED)}
        for n, place in enumerate(places):
            row, learn = torch.tensor(ids[place]), torch.tensor(learned[place])
            there = torch.ones(len(row))
            for name, values in {"input_ids": row, "attention_mask": there, "labels": row.where(learn, IGNORED)}.items():
                batch[name][n, : len(row)] = values
        yield {name: values.long().to(device()) for name, values in batch.items()}
