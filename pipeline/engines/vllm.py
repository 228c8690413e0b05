"""The fast scoring engine: vLLM with multi-LoRA, several adapters in one batch.

vLLM gives the log-probability of each prompt token (`prompt_logprobs`); completions are scored as part of the prompt. The
worker's environment decides on threads and on the engine's process: see `cluster.worker_env`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from pipeline.basemodel import fast_dtype
from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.merge.adapter import plain, read_adapter, write_adapter
from pipeline.tables import SCORES

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""

MAX_SEQUENCES = 64


class VllmScorer:
    """One vLLM engine."""

    def __init__(self, config: EngineConfig):
        self._plain_folder = tempfile.TemporaryDirectory(prefix="mashup-plain-")
        self._lora_ids: dict[str, int] = {}
        self.llm = LLM(
            config.base,
            skip_tokenizer_init=True,  # rows are token ids already
            dtype=str(fast_dtype(config.dtype)).removeprefix("torch."),
            max_model_len=_fitting_length(config),
            max_num_seqs=MAX_SEQUENCES,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=True,
            enable_prefix_caching=False,  # prompt log-probabilities need the whole prompt computed
            disable_log_stats=True,
            enable_lora=True,
            max_loras=config.adapters_per_batch,
            max_cpu_loras=config.adapters_per_batch,
            max_lora_rank=_fitting_rank(config.max_rank),
            # Without the output head: the wrapper that vLLM puts around it for LoRA breaks prompt log-probabilities.
            lora_target_modules=list(config.target_modules),
        )
        self._params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        # The base apart: in a batch with adapters, vLLM's own CPU code gives tokens without an adapter (index -1) the last one.
        groups = ([c for c in candidates if c.folder is None], [c for c in candidates if c.folder is not None])
        return pa.concat_tables([self._score(group, samples) for group in groups if group])

    def _score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        ids, masks = samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist()
        prompts = [{"prompt_token_ids": _up_to_last(row, mask)} for row, mask in zip(ids, masks, strict=True)]
        loras = [request for candidate in candidates for request in [self._lora(candidate)] * len(prompts)]
        outputs = self.llm.generate(prompts * len(candidates), self._params, lora_request=loras, use_tqdm=False)
        rows: dict[str, list[Any]] = {name: [] for name in SCORES.names}
        for place, output in enumerate(outputs):
            candidate, sample = divmod(place, len(prompts))
            nll, count, hits = _completion(output.prompt_logprobs, ids[sample], masks[sample])
            values = (candidates[candidate].adapter_id, samples["sample_id"][sample].as_py(), nll, count, hits)
            for name, value in zip(SCORES.names, values, strict=True):
                rows[name].append(value)
        return pa.table(rows, schema=SCORES)

    def _lora(self, candidate: Candidate) -> LoRARequest | None:
        if candidate.folder is None:
            return None
        number = self._lora_ids.setdefault(candidate.adapter_id, len(self._lora_ids) + 1)
        return LoRARequest(candidate.adapter_id, number, str(self._readable(candidate.folder, number)))

    def _readable(self, folder: Path, number: int) -> Path:
        """vLLM reads no rank_pattern and no alpha_pattern: such an adapter is rewritten with one rank, the same deltas."""
        adapter = read_adapter(folder)
        if adapter.uniform:
            return folder
        target = Path(self._plain_folder.name) / str(number)
        write_adapter(target, plain(adapter))
        return target


def _fitting_length(config: EngineConfig) -> int:
    """Room for the longest row and the one token that vLLM wants to generate, within the base's context."""
    context = getattr(AutoConfig.from_pretrained(config.base), "max_position_embeddings", None)
    return min(config.max_tokens + 1, context or config.max_tokens + 1)


def _fitting_rank(rank: int) -> int:
    fitting = [known for known in RANKS if known >= rank]
    if not fitting:
        raise ValueError(f"rank {rank} is above {RANKS[-1]}, the largest that vLLM serves; use search.engine: transformers")
    return fitting[0]


def _up_to_last(ids: list[int], mask: list[bool]) -> list[int]:
    """The row without what follows its last completion token."""
    return ids[: len(mask) - mask[::-1].index(True)]


def _completion(logprobs: list[dict[int, Any] | None], ids: list[int], mask: list[bool]) -> tuple[float, int, int]:
    """Sum of -log p, number and first choices of a row's completion tokens. vLLM's rank counts from 1."""
    picked = [entry[token] for entry, token, inside in zip(logprobs, ids, mask, strict=False) if inside and entry is not None]
    return -sum(entry.logprob for entry in picked), len(picked), sum(entry.rank == 1 for entry in picked)
