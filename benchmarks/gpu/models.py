"""Models of random weights at real shapes, made on the device, and rows for them. On a CPU all of them are tiny."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.checks import Setting
from benchmarks.pools import byte_tokenizer
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.model.completion_loss import Batch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "135M": Shape(30, 576, 1536, 9, 3, 49_152, tied=True),  # SmolLM2-135M
    "1B": Shape(16, 2048, 8192, 32, 8, 128_256, tied=True),  # Llama 3.2 1B
    "8B": Shape(32, 4096, 14_336, 32, 8, 128_256, tied=False),  # Llama 3.1 8B
}
TINY = Shape(2, 128, 256, 2, 1, 512, tied=True)


def shape_of(setting: Setting, name: str) -> Shape:
    return TINY if setting.tiny else SHAPES[name]


def make_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A Llama in evaluation mode. Each linear layer keeps the size of what it is given, so that logits are not flat."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.hidden**-0.5,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def saved_base(setting: Setting, name: str) -> str:
    """The folder of a base in bfloat16 with a tokenizer of one token a byte, made once a stage."""
    folder = setting.scratch / f"base-{name}"
    if not folder.exists():
        byte_tokenizer().save_pretrained(folder)
        make_model(shape_of(setting, name), torch.bfloat16, setting.device).save_pretrained(folder)
        if setting.device == "cuda":
            torch.cuda.empty_cache()  # an engine in another process may want nearly all of the device
    return str(folder)


def draw_rows(lengths: Sequence[int], learned: int, vocabulary: int, alike: int = 0) -> pa.Table:
    """Rows of random tokens, schema SAMPLES: the first `alike` tokens are the same in all, the last `learned` are the answer."""
    generator = torch.Generator().manual_seed(0)
    first = _tokens(alike, vocabulary, generator)
    rows = []
    for number, length in enumerate(lengths):
        mask = [False] * (length - learned) + [True] * learned
        ids = first + _tokens(length - alike, vocabulary, generator)
        rows.append({"sample_id": str(number), "input_ids": ids, "completion_mask": mask, "learn_mask": mask})
    return pa.Table.from_pylist([{"split": "train", **row} for row in rows], schema=SAMPLES)


def write_splits(folder: Path, rows: pa.Table) -> Folder:
    """Training rows, and a validation split of two of them."""
    data = Folder.at(folder)
    data.write_table("train.parquet", rows)
    data.write_table("validation.parquet", rows.slice(0, 2))
    return data


def mask_of(batch: Batch) -> Tensor:
    """Which tokens of a batch count; bool, shape (B, T)."""
    return torch.zeros_like(batch.ids_BT, dtype=torch.bool).flatten().index_fill(0, batch.index_N, True).view_as(batch.ids_BT)


def flat_gradient(weights: Sequence[Tensor]) -> Tensor:
    """All gradients as one vector in float32; they are cleared."""
    whole = torch.cat([weight.grad.float().flatten() for weight in weights if weight.grad is not None])
    for weight in weights:
        weight.grad = None
    return whole


def _tokens(count: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
    return drawn
