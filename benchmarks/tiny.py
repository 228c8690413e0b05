"""A pool of any size on a tiny base, all of it trained here: what a real base is too slow for on a small machine.

The base is a Llama of 2 layers over 1,024 byte pairs, trained for a while on a mixture of the demo's tasks. Real donors are
LoRA adapters that were trained on one task each, with seeds of their own. The pool is made from them: each adapter is
w_1 d_1 + w_2 d_2 of the delta weights of two random donors, w_1 ~ U(0, 1.5) and w_2 ~ U(-0.5, 1), truncated to rank RANK. So it
holds close relatives of the target's task, strangers, overshot and spoilt ones, in a continuum, which is harder to rank than
a pool of real donors.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from benchmarks.pools import tiny_llama
from examples.tasks import DONORS, TARGET, Row, draw
from pipeline.adapters.adapter import Adapter, from_factors, read_adapter, write_adapter
from pipeline.adapters.low_rank import truncate, weighted_sum
from pipeline.core.tables import SAMPLES
from pipeline.model.base_model import linear_shapes
from pipeline.model.completion_loss import collate, completion_nll

RANK, ALPHA = 4, 8
SEEDS = (1, 2)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE_STEPS, DONOR_STEPS = 400, 60
BATCH_ROWS = 32
VOCABULARY = 1024


def tiny_world(folder: Path) -> tuple[str, list[Path]]:
    """The trained base and its real donors, made once."""
    base = folder / "base"
    if not (base / "config.json").exists():
        _train_base(base)
    donors = []
    for seed in SEEDS:
        for task in DONORS:
            donor = folder / "donors" / f"{task}-{seed}"
            if not (donor / "adapter_config.json").exists():
                _train_donor(base, task, seed, donor)
            donors.append(donor)
    return str(base), donors


def made_pool(folder: Path, base: str, donors: Sequence[Path], count: int) -> pa.Table:
    """`count` adapters made from the donors, as catalogue rows (adapter_id, uri). The first are the same for every count."""
    adapters = [read_adapter(donor) for donor in donors]
    shapes, _ = linear_shapes(base)
    generator = random.Random(0)
    rows = []
    for number in range(count):
        parts, weights = generator.sample(adapters, 2), (generator.uniform(0, 1.5), generator.uniform(-0.5, 1))
        target = folder / f"made-{number:05d}"
        if not (target / "adapter_config.json").exists():
            write_adapter(target, _sum(base, parts, weights, shapes))
        rows.append({"adapter_id": target.name, "uri": str(target)})
    return pa.Table.from_pylist(rows)


def target_samples(seed: int, search: int, holdout: int) -> pa.Table:
    """Rows of the demo's target task, schema SAMPLES."""
    rows = [_tokens(row) for row in draw(TARGET, f"target {seed}", search + holdout)]
    splits = ["search"] * search + ["holdout"] * holdout
    return pa.Table.from_pylist(
        [{"sample_id": f"{seed}-{n}", "split": split, **row} for n, (row, split) in enumerate(zip(rows, splits, strict=True))],
        schema=SAMPLES,
    )


def _base_rows() -> list[Row]:
    """The mixture of tasks that the base and its byte pairs are trained on."""
    return [row for task, make in DONORS.items() for row in draw(make, f"base {task}", 200)]


@cache
def _tokenizer() -> Tokenizer:
    """Byte pairs of the donors' tasks. Training them takes a moment and gives the same each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{row['prompt']}\n{row['completion']}\n" for row in _base_rows()], trainer)
    return tokenizer


def _tokens(row: Row) -> dict[str, Any]:
    prompt, answer = (_tokenizer().encode(f"{row[part]}\n").ids for part in ("prompt", "completion"))
    mask = [False] * len(prompt) + [True] * len(answer)
    return {"input_ids": prompt + answer, "completion_mask": mask, "learn_mask": mask}


def _train_base(folder: Path) -> None:
    model = tiny_llama(VOCABULARY, heads=2)
    rows = _base_rows()
    random.Random(0).shuffle(rows)
    # The whole text is learned, as in pretraining, so that donors have something to add.
    _train(
        model, [{**tokens, "learn_mask": [True] * len(tokens["input_ids"])} for tokens in map(_tokens, rows)], BASE_STEPS, 1e-3
    )
    model.save_pretrained(folder)


def _train_donor(base: Path, task: str, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    _train(model.get_base_model(), [_tokens(row) for row in draw(DONORS[task], f"{task} {seed}", 400)], DONOR_STEPS, 5e-3)
    model.save_pretrained(str(folder))


def _train(model: Any, rows: list[dict[str, Any]], steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    for step in range(steps):
        chosen = [rows[(step * BATCH_ROWS + place) % len(rows)] for place in range(BATCH_ROWS)]
        batch = collate([row["input_ids"] for row in chosen], [row["learn_mask"] for row in chosen], torch.device("cpu"))
        completion_nll(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _sum(base: str, parts: Sequence[Adapter], weights: Sequence[float], shapes: Any) -> Adapter:
    deltas = {
        module: truncate(weighted_sum([part.factors(module) for part in parts], weights), RANK)[0] for module in parts[0].modules
    }
    return from_factors(base, deltas, RANK, ALPHA, shapes, seed=0)
