"""Choosing an engine by its name."""

import sys
from pathlib import Path

import pytest

from pipeline.engines.scorer import EngineConfig, build_scorer
from pipeline.engines.transformers import TransformersScorer


def engine_config(base: str) -> EngineConfig:
    return EngineConfig(base, "float32", max_rank=8, target_modules=("q_proj",), max_tokens=64, adapters_per_batch=2)


def test_transformers_needs_no_vllm(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert isinstance(build_scorer("transformers", engine_config(tiny_base)), TransformersScorer)


def test_a_missing_vllm_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.engines.vllm", None)
    with pytest.raises(RuntimeError, match=r"pip install '\.\[cpu\]'.*search.engine: transformers"):
        build_scorer("vllm", engine_config(str(tmp_path)))
