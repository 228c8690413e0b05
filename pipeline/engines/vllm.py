"""The fast scoring engine: vLLM with multi-LoRA, several adapters in one batch.

vLLM gives the log-probability of each prompt token (`prompt_logprobs`); completions are scored as part of the prompt. The
worker's environment decides on threads and on the engine's process: see `cluster.worker_env`.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig
from vllm import LLM, SamplingParams, envs
from vllm.lora.request import LoRARequest

from pipeline.basemodel import fast_dtype
from pipeline.engines import vllm_cpu
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded
from pipeline.engines.vllm_head import START
from pipeline.merge.adapter import WEIGHTS_FILE, for_engine
from pipeline.tables import SCORES

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""

MAX_SEQUENCES = 64

KEPT_BYTES, MOST_KEPT = 1 << 30, 512
"""Weights of adapters that an engine keeps at hand, and how many, beside those of the batch: a race comes back to them on its
next rung, and reading one takes as long as scoring it on several samples."""


@dataclass(frozen=True)
class Held:
    """An adapter in vLLM's memory, and the size of its weights."""

    request: LoRARequest
    bytes: int


@dataclass(frozen=True)
class Row:
    """A sample's tokens up to the last one of its completion."""

    ids: list[int]
    mask: list[bool]

    @property
    def start(self) -> int:
        """Its first completion token; a row's first token has nothing before it and never counts."""
        return max(1, self.mask.index(True))

    @property
    def params(self) -> SamplingParams:
        """Asks for log-probabilities from `start` on; what does not know `START` gives those of the tokens before, too."""
        return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, extra_args={START: self.start})

    def score(self, logprobs: list[dict[int, Any] | None]) -> tuple[float, int, int]:
        """Sum of -log p, number and first choices of the completion tokens. vLLM's rank counts from 1."""
        tail = logprobs[len(logprobs) - len(self.ids) + self.start :]
        tokens = zip(tail, self.ids[self.start :], self.mask[self.start :], strict=True)
        picked = [entry[token] for entry, token, inside in tokens if inside and entry is not None]
        return -sum(entry.logprob for entry in picked), len(picked), sum(entry.rank == 1 for entry in picked)


class VllmScorer:
    """One vLLM engine. It holds the adapters of a batch and as many others as fit; those used longest ago make room."""

    def __init__(self, config: EngineConfig):
        self._places, self.loaded = config.adapters_per_batch, Loaded()
        self._held: dict[Path, Held] = {}  # by their folders, the one used longest ago first
        self._numbers = itertools.count(1)
        if envs.VLLM_PLUGINS is None:  # it finds those of installed packages, and our code may have come with a Ray job
            vllm_cpu.register()
        self.llm = LLM(**_arguments(config))

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        # The base apart: in a batch with adapters, vLLM's own CPU code gives tokens without an adapter (index -1) the last one.
        groups = ([c for c in candidates if c.folder is None], [c for c in candidates if c.folder is not None])
        return pa.concat_tables([self._score_soundly(group, samples) for group in groups if group])

    def _score_soundly(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        """Scores that no other candidate has bent: attention multiplies what is left in a reused block of the KV cache by zero,
        and where an adapter left NaN or Inf there, that is NaN for whoever comes next."""
        scores = self._score(candidates, samples)
        if np.isfinite(scores["nll_sum"].to_numpy()).all():
            return scores
        self.llm.collective_rpc(_empty_cache)
        if len(candidates) == 1:
            return scores
        return pa.concat_tables([self._score_soundly([candidate], samples) for candidate in candidates])

    def _score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        rows = [_row(*row) for row in zip(samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist(), strict=True)]
        requests = self._hold(candidates)
        outputs = self.llm.generate(
            [{"prompt_token_ids": row.ids} for row in rows] * len(candidates),
            [row.params for row in rows] * len(candidates),
            lora_request=[request for request in requests for _ in rows],
            use_tqdm=False,
        )
        scores = [row.score(output.prompt_logprobs) for row, output in zip(rows * len(candidates), outputs, strict=True)]
        names = [candidate.adapter_id for candidate in candidates for _ in rows]
        columns = [names, samples["sample_id"].to_pylist() * len(candidates), *zip(*scores, strict=True)]
        return pa.table([pa.array(c, field.type) for c, field in zip(columns, SCORES, strict=True)], schema=SCORES)

    def _hold(self, candidates: Sequence[Candidate]) -> list[LoRARequest | None]:
        """What vLLM knows each candidate by. An adapter that it still holds is not read again."""
        folders = dict.fromkeys(candidate.folder for candidate in candidates if candidate.folder is not None)
        for folder in sorted(folders, key=lambda folder: folder not in self._held):
            self._held[folder] = self._held.pop(folder) if folder in self._held else self._load(folder)
        return [self._held[candidate.folder].request if candidate.folder else None for candidate in candidates]

    def _load(self, folder: Path) -> Held:
        """Have vLLM read an adapter, before there are requests for it: one that it refuses then leaves nothing behind."""
        with self.loaded.reading(folder / WEIGHTS_FILE), tempfile.TemporaryDirectory(prefix="mashup-plain-") as scratch:
            plain = for_engine(folder, Path(scratch))
            # Not under the adapter's id: an engine serves several races, whose ids may be alike.
            held = Held(LoRARequest(str(folder), next(self._numbers), str(plain)), (plain / WEIGHTS_FILE).stat().st_size)
            self._make_room(held.bytes)
            self.llm.llm_engine.add_lora(held.request)
        return held

    def _make_room(self, size: int) -> None:
        """Let adapters go, those used longest ago first, until one of so many bytes fits; those of a batch always do."""
        held = self._held
        while len(held) >= self._places and (len(held) >= MOST_KEPT or size + sum(h.bytes for h in held.values()) > KEPT_BYTES):
            self.llm.llm_engine.remove_lora(held.pop(next(iter(held))).request.lora_int_id)


def _empty_cache(worker: Any) -> None:
    """Runs in each of vLLM's workers."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _arguments(config: EngineConfig) -> dict[str, Any]:
    return {
        "model": config.base,
        "load_format": "safetensors",  # never pickle
        "skip_tokenizer_init": True,  # rows are token ids already
        "dtype": str(fast_dtype(config.dtype)).removeprefix("torch."),
        "max_model_len": _fitting_length(config),
        "max_num_seqs": MAX_SEQUENCES,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": True,
        "enable_prefix_caching": False,  # prompt log-probabilities need the whole prompt computed
        "disable_log_stats": True,
        "enable_lora": config.max_rank > 0,
        "max_loras": config.adapters_per_batch,
        "max_cpu_loras": max(MOST_KEPT, config.adapters_per_batch),
        "max_lora_rank": next(rank for rank in RANKS if rank >= config.max_rank),
        # Without the output head: the wrapper that vLLM puts around it for LoRA breaks prompt log-probabilities.
        "lora_target_modules": list(config.target_modules),
    }


def _fitting_length(config: EngineConfig) -> int:
    """Room for the longest row and the one token that vLLM wants to generate, within the base's context."""
    context = getattr(AutoConfig.from_pretrained(config.base), "max_position_embeddings", None)
    return min(config.max_tokens + 1, context or config.max_tokens + 1)


def _row(ids: list[int], mask: list[bool]) -> Row:
    """The row without what follows its last completion token."""
    end = len(mask) - mask[::-1].index(True)
    return Row(ids[:end], mask[:end])
