"""The output head only where a prompt's log-probabilities are wanted, for vLLM's CPU platform; part of the same plugin as
`vllm_cpu_lora`.

vLLM computes the logits of every prompt token, one request after the other. Its own option for less, `prompt_logprob_token_ids`,
does not tell whether the token was the first choice and needs a model runner that CPUs do not have. Here a request says from
which token on it wants them, and the requests of a step go through the head together.

A request says so in `SamplingParams.extra_args`, which vLLM hands through and does not read: without the plugin the same request
gets the log-probabilities of all its tokens. Those that were asked for are at the end in both cases.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

START = "prompt_logprobs_start"
"""Key in `extra_args`: the first prompt token whose log-probability is wanted, 1 or more."""

HEAD_ROWS = 256
"""Positions that go through the head at once, to bound the memory of their logits."""


@dataclass(frozen=True)
class PromptPart:
    """What one step computes for one request: the tokens `targets`, which go into `result` from `index` on; the first of
    them is predicted by the step's row `row`."""

    result: LogprobsTensors
    index: int
    row: int
    targets: list[int]


def register() -> None:
    """Put `prompt_logprobs` into vLLM's CPU model runner."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CPUModelRunner._get_prompt_logprobs_dict = prompt_logprobs


def prompt_logprobs(runner: Any, hidden_TH: Tensor, scheduled: dict[str, int]) -> dict[str, LogprobsTensors | None]:
    """Prompt log-probabilities of the requests whose prompt ends in this step.

    Takes the place of `GPUModelRunner._get_prompt_logprobs_dict`, which goes on to serve the requests that name no start.

    Args:
        runner: vLLM's model runner.
        hidden_TH: hidden states of the step's T tokens, request after request.
        scheduled: how many of them each request has.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    asked = runner.num_prompt_logprobs
    ours = [name for name, choices in asked.items() if choices == 0 and name in scheduled and _start(runner, name)]
    runner.num_prompt_logprobs = {name: choices for name, choices in asked.items() if name not in ours}
    try:
        ended = GPUModelRunner._get_prompt_logprobs_dict(runner, hidden_TH, scheduled)
    finally:
        runner.num_prompt_logprobs = asked
    _fill(runner, hidden_TH, [share for name in ours if (share := _share(runner, name, scheduled[name])).targets])
    ended |= {name: _take(runner, name) for name in ours if _ends(runner.requests[name], scheduled[name])}
    for name in ended:
        del asked[name]
    return ended


def _start(runner: Any, name: str) -> int:
    """Where the request wants to begin; 0 where it does not say."""
    return (runner.requests[name].sampling_params.extra_args or {}).get(START, 0)


def _share(runner: Any, name: str, count: int) -> PromptPart:
    """The wanted tokens that this step predicts: its `count` positions each predict the next token."""
    request, start = runner.requests[name], _start(runner, name)
    prompt, done = request.prompt_token_ids, request.num_computed_tokens
    if request.in_progress_prompt_logprobs_cpu is None:
        request.in_progress_prompt_logprobs_cpu = LogprobsTensors.empty_cpu(len(prompt) - start, 1)
    first = max(start, done + 1)
    row = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) + first - 1 - done
    return PromptPart(request.in_progress_prompt_logprobs_cpu, first - start, row, prompt[first : done + count + 1])


def _fill(runner: Any, hidden_TH: Tensor, shares: list[PromptPart]) -> None:
    """Run the head on the shares' rows and put each one's log-probabilities and ranks into its result."""
    rows = [share.row + offset for share in shares for offset in range(len(share.targets))]
    targets = [target for share in shares for target in share.targets]
    parts = [
        _head(runner, hidden_TH[rows[left : left + HEAD_ROWS]], torch.tensor(targets[left : left + HEAD_ROWS]))
        for left in range(0, len(rows), HEAD_ROWS)
    ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    left = 0
    for share in shares:
        count = len(share.targets)
        for column, result in zip(columns, share.result[:3], strict=True):
            result[share.index : share.index + count] = column[left : left + count]
        left += count


def _head(runner: Any, hidden_NH: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (N, 1), their log-probabilities (N, 1) and their ranks (N,), by vLLM's own means."""
    scores_NV = runner.sampler.compute_logprobs(runner.model.compute_logits(hidden_NH))
    return runner.sampler.gather_logprobs(scores_NV, 0, target_N.to(scores_NV.device))[:3]


def _ends(request: Any, count: int) -> bool:
    return request.num_computed_tokens + count >= len(request.prompt_token_ids)


def _take(runner: Any, name: str) -> LogprobsTensors:
    request = runner.requests[name]
    result, request.in_progress_prompt_logprobs_cpu = request.in_progress_prompt_logprobs_cpu, None
    return result
