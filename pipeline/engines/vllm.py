"""The fast scoring engine: vLLM with multi-LoRA, several adapters in one batch.

vLLM gives the log-probabilities of prompt tokens; completions are scored as part of the prompt. The engine runs in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`, which `resources.worker_env` sets, with the number of threads): a function then reaches the
workers of vLLM, which with tensor parallelism are processes that vLLM's own executor starts.
"""

import ctypes
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams, envs
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import supports_lora
from vllm.platforms import current_platform

from pipeline.core.errors import InputError, first_line
from pipeline.core.tables import SCORES
from pipeline.engines import vllm_cpu_lora
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded
from pipeline.engines.vllm_adapters import MOST_KEPT, HeldAdapters
from pipeline.engines.vllm_prompt_logprobs import START
from pipeline.model.base_model import class_name, context_length, fast_dtype, language_part, source, vocabulary

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""

MAX_SEQUENCES = 64

MEMORY_SHARE = 0.92
"""Of a GPU: vLLM's own default. It measures one step, without prompt log-probabilities, and takes the rest for its KV cache."""

LOGITS_TOKENS, LOGITS_COPIES = 1024, 3
"""Prompt tokens whose logits vLLM then computes at once, in float32, and how many tensors of that size it has at a time (logits,
capped logits, log-probabilities)."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""


@dataclass(frozen=True)
class Row:
    """A sample's tokens up to the last one of its completion."""

    ids: list[int]
    mask: list[bool]

    @property
    def start(self) -> int:
        """Its first completion token; a row's first token has nothing before it and never counts."""
        return max(1, self.mask.index(True))


class Logprobs(Protocol):
    """A way to ask vLLM for the log-probabilities of a row's completion, and to read them."""

    def ask(self, row: Row) -> SamplingParams: ...

    def read(self, row: Row, output: RequestOutput) -> tuple[float, int, int | None]:
        """Sum of -log p of the completion tokens, how many they are, and how many were the first choice; None: it is not told."""
        ...


class TokenObjects:
    """A dict and an object a token, with the token's rank: what every model runner of vLLM gives."""

    def ask(self, row: Row) -> SamplingParams:
        """From the row's start on; what does not know `START` gives those of the tokens before, too."""
        return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, extra_args={START: row.start})

    def read(self, row: Row, output: RequestOutput) -> tuple[float, int, int | None]:
        """vLLM's rank counts from 1."""
        logprobs: list[dict[int, Any] | None] = output.prompt_logprobs
        tail = logprobs[len(logprobs) - len(row.ids) + row.start :]
        tokens = zip(tail, row.ids[row.start :], row.mask[row.start :], strict=True)
        picked = [entry[token] for entry, token, inside in tokens if inside and entry is not None]
        return -sum(entry.logprob for entry in picked), len(picked), sum(entry.rank == 1 for entry in picked)


class TokenArray:
    """One array of the completion alone, and the output head runs on no other token: of model runner V2, without ranks."""

    def ask(self, row: Row) -> SamplingParams:
        """Position `prompt_logprob_start` is the one that predicts the first of the tokens, whose ids have the shape (N, 1)."""
        ids_N1 = np.array(row.ids[row.start :])[:, None]
        return SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprob_token_ids=ids_N1, prompt_logprob_start=row.start - 1
        )

    def read(self, row: Row, output: RequestOutput) -> tuple[float, int, int | None]:
        logprobs_N = output.prompt_token_id_logprobs[:, 0].astype(np.float64)
        inside_N = np.array(row.mask[row.start :])
        return -float(logprobs_N[inside_N].sum()), int(inside_N.sum()), None


class VllmScorer:
    """One vLLM engine. It holds the adapters of a batch and as many others as fit."""

    def __init__(self, config: EngineConfig) -> None:
        if envs.VLLM_PLUGINS is None:  # it finds those of installed packages, and our code may have come with a Ray job
            vllm_cpu_lora.register()
        self.llm = _start(config)
        if config.tensor_parallel_size > 1:
            self.llm.collective_rpc(_end_with_parent)
        self._config = config

    @cached_property
    def logprobs(self) -> Logprobs:
        return TokenArray() if self.llm.llm_engine.vllm_config.use_v2_model_runner else TokenObjects()

    @cached_property
    def adapters(self) -> HeldAdapters:
        slots, kept = self._config.adapters_per_batch, self._config.kept_bytes or 0
        return HeldAdapters(self.llm.llm_engine, slots, kept, ahead=self._config.tensor_parallel_size == 1)

    @property
    def loaded(self) -> Loaded:
        return self.adapters.loaded

    def load_ahead(self, candidate: Candidate) -> None:
        if candidate.folder:
            self.adapters.read_ahead(candidate.folder)

    def let_go_first(self, folders: Collection[Path]) -> None:
        self.adapters.let_go_first(folders)

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
        held = self.adapters.hold([candidate.folder for candidate in candidates if candidate.folder])
        requests = [held[candidate.folder] if candidate.folder else None for candidate in candidates]
        outputs = self._generate(rows * len(candidates), [request for request in requests for _ in rows])
        scores = [self.logprobs.read(row, output) for row, output in zip(rows * len(candidates), outputs, strict=True)]
        self._note_losses(candidates, scores)
        names = [candidate.adapter_id for candidate in candidates for _ in rows]
        columns = [names, samples["sample_id"].to_pylist() * len(candidates), *zip(*scores, strict=True)]
        return pa.table([pa.array(c, field.type) for c, field in zip(columns, SCORES, strict=True)], schema=SCORES)

    def _note_losses(self, candidates: Sequence[Candidate], scores: Sequence[tuple[float, int, int | None]]) -> None:
        """`scores`: as many of each candidate."""
        each = len(scores) // len(candidates)
        for place, candidate in enumerate(candidates):
            if candidate.folder:
                mine = scores[place * each : (place + 1) * each]
                self.adapters.note(candidate.folder, sum(score[0] for score in mine) / sum(score[1] for score in mine))

    def _generate(self, rows: Sequence[Row], adapters: Sequence[LoRARequest | None]) -> list[RequestOutput]:
        """vLLM's outputs for each row with its adapter. Where a step fails, what has not ended is taken back: vLLM keeps it, and
        would answer it together with the next batch."""
        prompts, asked = [{"prompt_token_ids": row.ids} for row in rows], [self.logprobs.ask(row) for row in rows]
        try:
            return self.llm.generate(prompts, asked, lora_request=adapters, use_tqdm=False)
        except Exception:
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise


def _start(config: EngineConfig) -> LLM:
    """vLLM with the base.

    Raises:
        InputError: vLLM has no class for it, or none that takes adapters.
    """
    try:
        return LLM(**_arguments(config))
    except Exception as error:  # vLLM raises what it likes
        name = class_name(config.base)
        if reason := _why_unserved(name, error, adapters=config.max_rank > 0):
            raise InputError(f"{config.base}: vLLM cannot serve a {name} ({reason}); set search.engine: transformers") from error
        raise


def _why_unserved(name: str, error: Exception, adapters: bool) -> str | None:
    """Why vLLM cannot serve bases of a class. None: it can, and what kept this engine from starting may pass, such as a lack of
    memory."""
    known = ModelRegistry.models.get(name)
    try:
        served = known and known.load_model_cls()
    except Exception as missing:  # of what its module imports
        return first_line(missing)
    if isinstance(error, ValidationError):  # of the config, before anything is loaded
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        return said.partition(". ")[0]  # before all the classes that it has
    return "it takes no adapters there" if adapters and served and not supports_lora(served) else None


def _empty_cache(worker: Any) -> None:
    """Runs in each of vLLM's workers."""
    with torch.inference_mode():  # in which vLLM may have made it
        for cache in worker.model_runner.kv_caches:
            cache.zero_()


def _end_with_parent(worker: Any) -> None:
    """Runs in each of vLLM's worker processes: the kernel ends it when the engine's process is gone, however that ended. Left to
    itself a worker looks for that between two steps, and never where the other one, which it waits for, is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _arguments(config: EngineConfig) -> dict[str, Any]:
    path, revision = source(config.base, weights=True)
    return {
        **({} if current_platform.is_cpu() else _on_gpus(config.base)),
        "model": path,
        "revision": revision,
        "load_format": "safetensors",  # never pickle
        "skip_tokenizer_init": True,  # rows are token ids already
        "language_model_only": True,  # of a class with encoders, which else wants a tokenizer and a processor of pictures
        "dtype": str(fast_dtype(config.dtype)).removeprefix("torch."),
        "max_model_len": _fitting_length(config),
        "max_num_seqs": MAX_SEQUENCES,
        "tensor_parallel_size": config.tensor_parallel_size,
        # In a placement group vLLM would start its workers through Ray, which has nothing left to give them.
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
        "enforce_eager": True,
        "enable_prefix_caching": False,  # prompt log-probabilities need the whole prompt computed
        "disable_log_stats": True,
        "enable_lora": config.max_rank > 0,
        "max_loras": config.adapters_per_batch,
        "max_cpu_loras": MOST_KEPT + config.adapters_per_batch,
        "max_lora_rank": next(rank for rank in RANKS if rank >= config.max_rank),
        # Without the output head: the wrapper that vLLM puts around it for LoRA breaks prompt log-probabilities.
        "lora_target_modules": list(config.target_modules),
    }


def _on_gpus(base: str) -> dict[str, Any]:
    """Logits in float32, as those of bfloat16 have an error of 0.06 nats at 16, and room for them. On CPUs vLLM would copy the
    head's weights for this in each step. Its batch-invariant products know no output of another type than the inputs'."""
    logits = LOGITS_COPIES * LOGITS_TOKENS * vocabulary(base) * 4
    share = MEMORY_SHARE - logits / current_platform.get_device_total_memory()
    if envs.VLLM_BATCH_INVARIANT:
        return {"gpu_memory_utilization": share}
    asked, part = {"head_dtype": "float32"}, language_part(base)  # where a language model is a part, it has the head
    return {"gpu_memory_utilization": share, "hf_overrides": {**asked, **({part: asked} if part else {})}}


def _fitting_length(config: EngineConfig) -> int:
    """Room for the longest row and the one token that vLLM wants to generate, within the base's context."""
    return min(config.max_tokens + 1, context_length(config.base))


def _row(ids: list[int], mask: list[bool]) -> Row:
    """The row without what follows its last completion token."""
    end = len(mask) - mask[::-1].index(True)
    return Row(ids[:end], mask[:end])
