"""The paced engine's stand-in for vLLM's slots, filled by the product's own loader."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import paced
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.engines.scorer import Candidate, EngineConfig


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced, "LAYERS", 1)
    monkeypatch.setattr(paced, "LEAVES", {"self_attn.q_proj": (8, 8), "mlp.down_proj": (16, 8)})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ahead", [True, False])
def test_every_tensor_of_an_adapter_is_copied_into_a_slot(tmp_path: Path, ahead: bool) -> None:
    pool = paced.write_pool(tmp_path, 2, rank=4)
    second = Path(pool["uri"][-1].as_py())
    scorer = paced.PacedScorer(EngineConfig("paced", "bfloat16", 4, ("q_proj", "down_proj"), 16, adapters_per_batch=1), ahead)
    candidate = Candidate("second", second)
    scorer.load_ahead(candidate)
    scores = scorer.score([candidate], paced.random_samples(3, 5, 10))
    slot = scorer.adapters._engine._slots[0]
    assert scores["adapter_id"].to_pylist() == ["second"] * 3
    assert all(torch.equal(slot[name], tensor) for name, tensor in load_file(second / WEIGHTS_FILE).items())
    assert scorer.loaded.adapters == 1
