"""Bases, pools and samples for the benchmarks: a tiny random Llama and adapters for it, or real ones that the user names."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.adapters.adapter import from_factors, hash_of, write_adapter
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.pool import SETTLED, look_at
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.model.base_model import Shapes, linear_shapes

if TYPE_CHECKING:
    from pipeline.search.scoreboard import Work

TARGETS = ("q_proj", "v_proj")
VOCABULARY = 512


def tiny_base(folder: Path) -> str:
    """A random Llama of 2 layers, without a tokenizer: enough for rows that are token ids already."""
    tiny_llama(VOCABULARY, heads=1).save_pretrained(folder)
    return str(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, without a chat template."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    text = Tokenizer(models.BPE(vocab=letters, merges=[]))
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=text)


def tiny_llama(vocabulary: int, heads: int) -> LlamaForCausalLM:
    """A Llama of 2 layers with seeded random weights; each attention head has 64 features."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64 * heads,
        intermediate_size=128 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def random_adapters(
    folder: Path, base: str, count: int, rank: int, targets: Iterable[str] = TARGETS, size: float = 0.02
) -> pa.Table:
    """`count` adapters of random weights on the layers whose names end in `targets`, as catalogue rows (adapter_id, uri); `size`
    is the standard deviation of B."""
    shapes, _ = linear_shapes(base)
    chosen = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in targets}
    names = [f"random-{number:05d}" for number in range(count)]
    for seed, name in enumerate(names):
        write_adapter(folder / name, from_factors(base, _random_deltas(chosen, rank, seed, size), rank, 2 * rank, shapes, seed))
    return pa.table({"adapter_id": names, "uri": [str(folder / name) for name in names]})


def with_states(pool: pa.Table, where: str) -> pa.Table:
    """Candidates of the pool at `where` with what an index says of their files, once these files' times tell what comes later."""
    time.sleep(SETTLED / 1e9 + 1)
    states = {one.adapter_id: one.state for one in look_at(where).found}
    place = pool.schema.get_field_index("state")
    return pool.set_column(place, "state", pa.array([states[name] for name in pool["adapter_id"].to_pylist()]))


def random_samples(count: int, length: int, vocabulary: int, completion: int = 8) -> pa.Table:
    """Rows of random token ids, the last `completion` of them the answer."""
    generator = torch.Generator().manual_seed(0)
    mask = [False] * (length - completion) + [True] * completion
    rows = [
        {
            "sample_id": str(number),
            "split": "search",
            "input_ids": torch.randint(3, vocabulary, (length,), generator=generator).tolist(),
            "completion_mask": mask,
            "learn_mask": mask,
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def everything(adapters: pa.Table, samples: pa.Table, scores: Path) -> "Work":
    """The base and these adapters on these samples, with a score store at `scores`."""
    from pipeline.search.batch import candidates_table, with_base
    from pipeline.search.score_store import ScoreStore
    from pipeline.search.scoreboard import Work  # needs Ray, which half of the GPU check does without

    names, uris = adapters["adapter_id"].to_pylist(), adapters["uri"].to_pylist()
    candidates = with_base(candidates_table(names, uris, [hash_of(Path(uri)) for uri in uris]))
    return Work(candidates, samples, ScoreStore.at(str(scores), "base", "engine", "dtype"), Folder.at(scores / "failures"))


def _random_deltas(shapes: Shapes, rank: int, seed: int, size: float) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, inputs, generator=generator) / inputs**0.5, torch.randn(outputs, rank, generator=generator) * size
        )
        for name, (outputs, inputs) in shapes.items()
    }
