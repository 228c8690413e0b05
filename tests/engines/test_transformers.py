"""The oracle engine against PEFT done by hand, and what an adapter that fails leaves behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.core.errors import AdapterError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.tables import BASE_ID, SCORES
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded, build_scorer
from pipeline.engines.transformers import TransformersScorer


@pytest.fixture
def scorer(engine_config: EngineConfig) -> TransformersScorer:
    return TransformersScorer(engine_config)


def by_hand(base: str, candidate: Candidate, samples: pa.Table) -> list[dict[str, object]]:
    """Each row alone through PEFT's model and its full logits."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if candidate.folder is not None:
        model = PeftModel.from_pretrained(model, str(candidate.folder)).eval()
    rows = []
    for sample in samples.to_pylist():
        ids, mask = torch.tensor([sample["input_ids"]]), torch.tensor(sample["completion_mask"])[1:]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)[mask]
        target = ids[0, 1:][mask]
        rows.append(
            {
                "adapter_id": candidate.adapter_id,
                "sample_id": sample["sample_id"],
                "nll_sum": pytest.approx(-float(logp.gather(1, target[:, None]).sum()), abs=1e-3),
                "n_tokens": len(target),
                "n_correct": int((logp.argmax(dim=-1) == target).sum()),
            }
        )
    return rows


def test_scores_are_those_of_peft_by_hand(
    scorer: TransformersScorer, tiny_base: str, candidates: list[Candidate], samples: pa.Table
) -> None:
    scores = scorer.score(candidates, samples)
    assert scores.schema == SCORES
    expected = [row for candidate in candidates for row in by_hand(tiny_base, candidate, samples)]
    assert scores.to_pylist() == expected


WHOLE: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    {"trainable_token_indices": list(range(0, 400, 3))},
]


@pytest.mark.parametrize("fields", WHOLE)
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_layers_that_an_adapter_saves_whole_are_scored_as_peft_has_them(
    which: str,
    fields: dict[str, Any],
    engine_config: EngineConfig,
    samples: pa.Table,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    """And the base after it is scored as before."""
    base = str(request.getfixturevalue(which))
    scorer = TransformersScorer(replace(engine_config, base=base))
    alone, trained = Candidate(BASE_ID, None), Candidate("whole", make_adapter(tmp_path, base, whole=0.3, **fields))
    before = scorer.score([alone], samples)
    assert scorer.score([trained], samples).to_pylist() == by_hand(base, trained, samples)
    assert scorer.score([alone], samples).equals(before)


def test_an_adapter_leaves_no_trace_on_the_next_one(
    scorer: TransformersScorer, candidates: list[Candidate], samples: pa.Table
) -> None:
    alone = {c.adapter_id: scorer.score([c], samples).to_pylist() for c in candidates}
    backwards = scorer.score(candidates[::-1], samples).to_pylist()
    assert backwards == [row for c in candidates[::-1] for row in alone[c.adapter_id]]


def test_the_adapters_differ_from_the_base(scorer: TransformersScorer, candidates: list[Candidate], samples: pa.Table) -> None:
    table = scorer.score(candidates, samples).group_by("adapter_id").aggregate([("nll_sum", "sum")]).to_pylist()
    sums = {row["adapter_id"]: row["nll_sum_sum"] for row in table}
    assert all(abs(sums[name] - sums[BASE_ID]) > 0.5 for name in sums if name != BASE_ID)


@pytest.mark.parametrize("spoilt", ["truncated", "one module of wrong shape", "config"])
def test_an_adapter_that_fails_leaves_no_trace_either(
    spoilt: str,
    scorer: TransformersScorer,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    broken = make_adapter(tmp_path, tiny_base, seed=9, std=0.5, targets="all-linear")
    weights = broken / WEIGHTS_FILE
    if spoilt == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif spoilt == "config":
        (broken / "adapter_config.json").write_text("{}")
    else:
        tensors = load_file(weights)
        save_file({**tensors, sorted(tensors)[-1]: torch.ones(3, 5)}, weights)
    expected = scorer.score(candidates[:2], samples)
    with pytest.raises(Exception, match=r".+"):
        scorer.score([Candidate("broken", broken)], samples)
    assert scorer.score(candidates[:2], samples).equals(expected)


def test_the_engine_is_built_by_its_name(engine_config: EngineConfig) -> None:
    assert isinstance(build_scorer("transformers", engine_config), TransformersScorer)


def test_it_says_what_reading_adapters_took(scorer: TransformersScorer, candidates: list[Candidate], samples: pa.Table) -> None:
    """But not of the base, nor of one that cannot be read."""
    scorer.score(candidates[:1], samples)
    assert scorer.loaded == Loaded()
    before = scorer.loaded.so_far()
    scorer.score(candidates[:3], samples)
    with pytest.raises(AdapterError, match="is missing"):
        scorer.score([Candidate("gone", Path("gone"))], samples)
    read = scorer.loaded.since(before)
    assert (read.adapters, read.bytes) == (2, sum((one.folder / WEIGHTS_FILE).stat().st_size for one in candidates[1:3]))  # type: ignore[operator]
    assert read.seconds > 0
