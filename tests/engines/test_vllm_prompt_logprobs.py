"""The head on the wanted positions alone, against vLLM's own prompt log-probabilities, on a model runner that has just a head."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install '.[cpu]'")

from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pipeline.engines import vllm_prompt_logprobs
from pipeline.engines.vllm_prompt_logprobs import START, prompt_logprobs

HIDDEN, VOCABULARY = 8, 40
LENGTHS = {"a": 9, "b": 6, "c": 2}
STARTS = {"a": 4, "b": 1, "c": 1}
STEPS = ({"a": 3, "b": 2}, {"b": 4, "a": 1, "c": 2}, {"a": 5})
"""Prompts in chunks: what each step computes, in the order of its rows. The wanted part of `a` begins within its second chunk."""


class Runner(SimpleNamespace):
    """What of vLLM's model runner the two methods use. `head_rows` counts the positions that went through the head."""

    def __init__(self, starts: dict[str, int], choices: int = 0):
        generator = torch.Generator().manual_seed(0)
        self.head_rows = 0
        self.head_HV = torch.randn(HIDDEN, VOCABULARY, generator=generator)
        self.hidden = {name: torch.randn(length, HIDDEN, generator=generator) for name, length in LENGTHS.items()}
        self.requests = {name: self.request(length, starts.get(name), generator) for name, length in LENGTHS.items()}
        self.num_prompt_logprobs = dict.fromkeys(LENGTHS, choices)
        self.model = SimpleNamespace(compute_logits=self.compute_logits)
        self.sampler, self.device = Sampler(), torch.device("cpu")
        self.model_config = SimpleNamespace(logprobs_mode="raw_logprobs")

    def request(self, length: int, start: int | None, generator: torch.Generator) -> SimpleNamespace:
        return SimpleNamespace(
            prompt_token_ids=torch.randint(0, VOCABULARY, (length,), generator=generator).tolist(),
            num_computed_tokens=0,
            in_progress_prompt_logprobs_cpu=None,
            sampling_params=SimpleNamespace(extra_args=None if start is None else {START: start}),
        )

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.head_rows += len(hidden)
        return hidden @ self.head_HV

    def _sync_device(self) -> None:
        """Nothing to wait for."""

    def run(self, method: Any) -> dict[str, LogprobsTensors]:
        """All steps with `method`, each request's result as the engine gets it."""
        found: dict[str, LogprobsTensors] = {}
        for step in STEPS:
            parts = []
            for name, count in step.items():
                done = self.requests[name].num_computed_tokens
                parts.append(self.hidden[name][done : done + count])
            self.input_batch = SimpleNamespace(req_id_to_index={name: place for place, name in enumerate(step)})
            self.query_start_loc = SimpleNamespace(np=np.cumsum([0, *step.values()]))
            found |= method(self, torch.cat(parts), step)
            for name, count in step.items():
                self.requests[name].num_computed_tokens += count
        assert not self.num_prompt_logprobs
        assert all(request.in_progress_prompt_logprobs_cpu is None for request in self.requests.values())
        return found


def assert_is_the_end_of(found: LogprobsTensors, full: LogprobsTensors, count: int) -> None:
    for column, whole in zip(found[:3], full[:3], strict=True):
        assert len(column) == count
        torch.testing.assert_close(column, whole[len(whole) - count :])


@pytest.mark.parametrize("head_rows", [3, 256])
def test_the_wanted_tokens_are_as_vllm_gives_them(head_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_prompt_logprobs, "HEAD_ROWS", head_rows)
    full = Runner({}).run(GPUModelRunner._get_prompt_logprobs_dict)
    runner = Runner(STARTS)
    found = runner.run(prompt_logprobs)
    for name, start in STARTS.items():
        assert_is_the_end_of(found[name], full[name], LENGTHS[name] - start)
    assert runner.head_rows == sum(LENGTHS[name] - start for name, start in STARTS.items())


def test_vllm_itself_gives_all_tokens_of_a_request_that_names_a_start() -> None:
    full, found = (Runner(starts).run(GPUModelRunner._get_prompt_logprobs_dict) for starts in ({}, STARTS))
    for name, length in LENGTHS.items():
        assert_is_the_end_of(found[name], full[name], length - 1)


def test_requests_that_name_no_start_are_left_to_vllm() -> None:
    full = Runner({}).run(GPUModelRunner._get_prompt_logprobs_dict)
    found = Runner({"b": 3}).run(prompt_logprobs)
    assert_is_the_end_of(found["b"], full["b"], 3)
    for name in ("a", "c"):
        assert_is_the_end_of(found[name], full[name], LENGTHS[name] - 1)


def test_requests_that_want_other_choices_too_are_left_to_vllm() -> None:
    full = Runner({}, choices=2).run(GPUModelRunner._get_prompt_logprobs_dict)
    found = Runner(STARTS, choices=2).run(prompt_logprobs)
    for name, length in LENGTHS.items():
        assert found[name].logprobs.shape == (length - 1, 3)
        assert_is_the_end_of(found[name], full[name], length - 1)
