"""Trains the demo's pool: fourteen LoRA adapters, as unlike each other in shape as a user's past finetunes would be.

A plain loop on one machine, a few minutes a donor on two CPU cores. Each donor starts from a seed of its own, so that averaging
A and B apart would be wrong. Two defective folders are added, which the demo's catalogue sets aside.

    python -m examples.train_donors                              # what is missing of examples/pool
    python -m examples.train_donors --only sums-plus --out /tmp/pool
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from examples.base_model import base_model
from examples.folders import appear_whole
from examples.tasks import DONORS, Row, donor_rows
from pipeline.adapters.adapter import read_adapter, write_adapter
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.data.tokenise import tokenise
from pipeline.model.base_model import fast_dtype, load_model, load_tokenizer
from pipeline.model.completion_loss import completion_nll, score_tokens
from pipeline.train.batches import row_numbers
from pipeline.train.evaluate import Rows, as_metrics, evaluate

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
POOL = Path(__file__).parent / "pool"

TRAIN_ROWS, HELDOUT_ROWS = 320, 64
BATCH_ROWS = 16
WARMUP = 0.05
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How a donor is trained. `lr` is the peak of a cosine over `steps` batches of 16 rows."""

    seed: int
    rank: int = 4
    alpha: int = 8
    target_modules: tuple[str, ...] = ATTENTION
    use_rslora: bool = False
    lr: float = 2e-3
    steps: int = 24


RECIPES = {
    "reviews-hotels": Recipe(seed=11, steps=40),
    "reviews-restaurants": Recipe(seed=12, rank=2, alpha=4, target_modules=ALL_LINEAR),
    "reviews-films": Recipe(seed=13, steps=32),
    "units-length": Recipe(seed=14, steps=16),
    "units-mass": Recipe(seed=15, rank=2, alpha=4, target_modules=ALL_LINEAR, steps=32),
    "units-time": Recipe(seed=16, steps=16),
    "sums-plus": Recipe(seed=17),
    "sums-minus": Recipe(seed=18, rank=2, alpha=4, target_modules=ALL_LINEAR),
    "dates-iso": Recipe(seed=19, rank=2, alpha=4, target_modules=ALL_LINEAR, use_rslora=True, steps=16),
    "dates-clock": Recipe(seed=20),
    "notes-city": Recipe(seed=21, rank=2, alpha=4, steps=16),
    "notes-goods": Recipe(seed=22, rank=2, alpha=4, target_modules=ALL_LINEAR, steps=16),
    "words-plural": Recipe(seed=23, rank=2, alpha=4, target_modules=ALL_LINEAR, steps=20),
    "words-initials": Recipe(seed=24, steps=16),
}
"""Steps were cut to save time where a task is easy; the sums, units-time and dates-clock are only half learned by then."""

COPY_OF = "notes-city"
"""The smallest donor, which a defective folder copies."""


def train_donor(task: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train one donor and write it to `folder`; returns what its training.json says."""
    started = time.perf_counter()
    train, heldout = (_tokenised(rows) for rows in donor_rows(task, TRAIN_ROWS, HELDOUT_ROWS))
    model = _fresh(recipe)
    before = _measure(model, heldout)
    _finetune(model, train, recipe)
    _round_weights(model)
    after = _measure(model, heldout)
    record = {"task": task, **asdict(recipe), "before": before, "after": after}
    record["seconds"] = round(time.perf_counter() - started)
    with appear_whole(folder) as scratch:
        _save(model, scratch)
        (scratch / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        (scratch / "README.md").write_text(f"Licence: Apache-2.0.\nLoRA adapter of {BASE_NAME} for the demo's task {task}.\n")
    return record


def add_defective(pool: Path) -> None:
    """Add what a catalogue must set aside: a folder whose weights are a pickle, and a donor under a second name."""
    pickled, copy = pool / "old-checkpoint", pool / f"{COPY_OF}-copy"
    if not pickled.is_dir():
        with appear_whole(pickled) as scratch:
            shutil.copy(pool / COPY_OF / CONFIG_FILE, scratch)
            (scratch / "adapter_model.bin").write_bytes(b"not a pickle: this file is never to be opened\n")
    if not copy.is_dir():
        with appear_whole(copy) as scratch:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copy(pool / COPY_OF / name, scratch)


def _tokenised(rows: list[Row]) -> Rows:
    tokenizer = load_tokenizer(str(base_model()))
    return Rows(pa.Table.from_pylist([tokenise(row, tokenizer) for row in rows]))


def _fresh(recipe: Recipe) -> PeftModel:
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(str(base_model()), fast_dtype("auto")), config)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME  # PEFT puts the local folder there
    return model


def _finetune(model: PeftModel, rows: Rows, recipe: Recipe) -> None:
    """AdamW on the mean NLL of the learned tokens: the completion and the end of its turn."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * recipe.steps), recipe.steps)
    model.train()
    for step in range(recipe.steps):
        batch = rows.batch(row_numbers(step, step + 1, BATCH_ROWS, len(rows), recipe.seed).tolist())
        loss = completion_nll(model.get_base_model(), batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"  step {step + 1}/{recipe.steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def _round_weights(model: PeftModel) -> None:
    """Round the adapter to bfloat16, as it is saved, so that what is measured is what is kept."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16().to(weight.dtype)


def _measure(model: PeftModel, rows: Rows) -> dict[str, float]:
    metrics = as_metrics(evaluate(partial(score_tokens, model.get_base_model()), rows))
    return {"nll": round(metrics["eval_nll"], 4), "exact_match": round(metrics["eval_exact_match"], 4)}


def _save(model: PeftModel, folder: Path) -> None:
    """Write the adapter with bfloat16 weights, and without the model card that PEFT makes up."""
    full = folder / "float32"
    model.save_pretrained(str(full))
    write_adapter(folder, read_adapter(full), torch.bfloat16)
    shutil.rmtree(full)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's donor adapters; those that exist are kept.")
    parser.add_argument("--only", choices=sorted(DONORS), help="train this donor alone")
    parser.add_argument("--out", type=Path, default=POOL, help="folder of the pool")
    arguments = parser.parse_args()
    for task in [arguments.only] if arguments.only else DONORS:
        if not (arguments.out / task).is_dir():
            print(f"{task}", flush=True)
            print(json.dumps(train_donor(task, RECIPES[task], arguments.out / task)), flush=True)
    if arguments.only is None:
        add_defective(arguments.out)


if __name__ == "__main__":
    main()
