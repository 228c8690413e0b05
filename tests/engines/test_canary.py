"""The canary: an engine that is right passes, and each way of being wrong is named with the way out."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.core.storage import Folder
from pipeline.engines import canary
from pipeline.engines.canary import Canary, EngineFaultError, make_canary, prove, proven_scorer, short_rows
from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.engines.transformers import TransformersScorer
from pipeline.model.base_model import load_model


@pytest.fixture(scope="module")
def made(engine_config: EngineConfig, samples: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Canary:
    return made_in(tmp_path_factory.mktemp("canary"), engine_config, samples)


def made_in(folder: Path, config: EngineConfig, samples: pa.Table) -> Canary:
    made = make_canary(config, short_rows(samples), folder)
    assert made is not None
    return made


class Faulty:
    """An engine with something wrong: `bend` gets the candidates, the rows' places and the sums of a batch, (C, S)."""

    def __init__(self, config: EngineConfig, bend: Callable[[Sequence[Candidate], list[str], Any], Any]):
        self.right, self.bend = TransformersScorer(config), bend

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        scores = self.right.score(candidates, samples)
        sums_CS = scores["nll_sum"].to_numpy().reshape(len(candidates), -1).copy()
        bent = self.bend(candidates, samples["sample_id"].to_pylist(), sums_CS).flatten()
        return scores.set_column(scores.column_names.index("nll_sum"), "nll_sum", pa.array(bent))


def test_the_known_adapter_has_a_large_effect(made: Canary) -> None:
    assert made.known_S is not None
    assert np.abs(made.known_S - made.base_S).max() > 2 * max(canary.TOLERANCE.values())


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_is_right_passes(
    engine_config: EngineConfig, samples: pa.Table, tmp_path: Path, batch: int, dtype: str
) -> None:
    config = replace(engine_config, adapters_per_batch=batch, dtype=dtype)
    made = made_in(tmp_path, config, samples)
    assert prove("transformers", TransformersScorer(config), config, made) < canary.TOLERANCE[dtype] / 3


def test_an_engine_for_the_base_alone_is_proved_on_the_base(
    engine_config: EngineConfig, samples: pa.Table, tmp_path: Path
) -> None:
    config = replace(engine_config, max_rank=0)
    alone = made_in(tmp_path, config, samples)
    assert prove("transformers", TransformersScorer(config), config, alone) < 0.005
    with pytest.raises(EngineFaultError, match="of the base"):
        prove("transformers", Faulty(config, lambda _, rows, sums: sums + 1), config, alone)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "the base is off": (
        lambda them, rows, sums: sums * (1.1 if them[0].folder is None else 1),
        "its losses of the base are up to",
    ),
    "an adapter is off": (lambda them, rows, sums: sums + [[2 * (one.folder is not None)] for one in them], "plain PEFT"),
    "NaN": (lambda them, rows, sums: np.where(them[0].folder is None, sums, np.nan), "gives NaN or Inf"),
    "rows change places": (lambda them, rows, sums: sums[:, ::-1], "losses of the base are up to"),
    "the order counts": (
        lambda them, rows, sums: sums + (rows[0] != "s0" and them[0].adapter_id == "other"),
        "changes by .* with what else is in the batch",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_wrong_is_named_with_what_to_do(fault: str, engine_config: EngineConfig, made: Canary) -> None:
    bend, message = FAULTS[fault]
    said = f"vllm failed its self-check on this base: .*{message}.*VLLM_USE_V2_MODEL_RUNNER=0"
    with pytest.raises(EngineFaultError, match=said):
        prove("vllm", Faulty(engine_config, bend), engine_config, made)


def test_an_engine_that_leaves_adapters_out_is_wrong(engine_config: EngineConfig, made: Canary) -> None:
    class Deaf(TransformersScorer):
        def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
            return super().score([replace(candidate, folder=None) for candidate in candidates], samples)

    with pytest.raises(
        EngineFaultError, match=r"an adapter that changes the loss by .* changes nothing; set search.engine: transf"
    ):
        prove("vllm", Deaf(engine_config), engine_config, made)


def test_an_engine_that_leaves_one_kind_of_module_out_is_wrong(
    engine_config: EngineConfig, made: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its names for them are others."""
    from peft import PeftModel

    load = PeftModel.from_pretrained

    def without_down_proj(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        for name, weight in model.named_parameters():
            if "down_proj" in name and "lora_B" in name:
                weight.data.zero_()
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", without_down_proj)
    with pytest.raises(EngineFaultError, match="plain PEFT"):
        prove("vllm", TransformersScorer(engine_config), engine_config, made)


def test_an_engine_that_fails_on_a_plain_adapter_is_at_fault_itself(engine_config: EngineConfig, made: Canary) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("CUDA error: no kernel image\nis available")

    with pytest.raises(EngineFaultError, match=r"fails on the base or on a plain adapter \(CUDA error: no kernel image\)"):
        prove("vllm", Faulty(engine_config, fail), engine_config, made)


def test_the_references_logits_are_float32(tiny_base: str) -> None:
    """As exact as its hidden states allow: those of the head in bfloat16 are off by a hundred times that."""
    model, ids = load_model(tiny_base, torch.bfloat16), torch.tensor([[5, 7, 11]])
    hidden = model.model(ids).last_hidden_state.float()
    canary.compute_logits_in_float32(model)
    torch.testing.assert_close(model(ids).logits.float(), hidden @ model.lm_head.weight.float().T, atol=1e-6, rtol=1e-5)


def test_rows_are_cut_to_the_end_of_their_completion() -> None:
    rows = pa.table(
        {
            "sample_id": ["long", "short"],
            "input_ids": [list(range(200)), [1, 2, 3, 4]],
            "completion_mask": [[90 <= place < 120 for place in range(200)], [False, True, True, False]],
        }
    )
    long, short = short_rows(rows).to_pylist()
    assert long["input_ids"] == list(range(88, 120))
    assert sum(long["completion_mask"]) == 30
    assert short["input_ids"] == [1, 2, 3]


def test_a_proof_is_kept_for_engines_of_its_kind(
    engine_config: EngineConfig, samples: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[EngineConfig] = []

    def counted(config: EngineConfig, *others: Any) -> Canary | None:
        made.append(config)
        return make_canary(config, *others)

    monkeypatch.setattr(canary, "make_canary", counted)
    start = lambda config: proven_scorer("transformers", config, samples, Folder.at(tmp_path))  # noqa: E731
    for config in (engine_config, replace(engine_config, max_rank=9, max_tokens=99)):
        assert isinstance(start(config), TransformersScorer)
    assert len(made) == 1
    start(replace(engine_config, target_modules=("q_proj",)))
    monkeypatch.setattr(canary, "version", lambda package: "another")
    start(engine_config)
    assert len(made) == 3


def test_a_proof_of_vllm_holds_for_the_kernels_that_it_picks(engine_config: EngineConfig) -> None:
    about = lambda **changes: canary._about("vllm", replace(engine_config, **changes))  # noqa: E731
    assert about(max_rank=9) == about(max_rank=16)
    assert about(max_rank=9) != about(max_rank=17)
    assert about(adapters_per_batch=2) != about(adapters_per_batch=4)


def test_a_proof_holds_for_the_class_that_the_base_names(engine_config: EngineConfig, tiny_base: str, tmp_path: Path) -> None:
    """The same weights may come with the config of a class that sees, of which engines have another one."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    before = canary._about("vllm", replace(engine_config, base=str(base)))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForConditionalGeneration"]}))
    assert canary._about("vllm", replace(engine_config, base=str(base))) == before | {"class": "LlamaForConditionalGeneration"}


def test_an_engine_that_failed_is_asked_again(
    engine_config: EngineConfig, samples: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = lambda engine, config: Faulty(config, lambda _, rows, sums: sums + 1)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(canary, "build_scorer", wrong)
        for _ in range(2):
            with pytest.raises(EngineFaultError):
                proven_scorer("transformers", engine_config, samples, Folder.at(tmp_path))
    assert proven_scorer("transformers", engine_config, samples, Folder.at(tmp_path))


def test_tokens_that_the_base_does_not_know_prove_nothing(engine_config: EngineConfig, samples: pa.Table, tmp_path: Path) -> None:
    ids = pa.array([[10**6] * len(row) for row in samples["input_ids"].to_pylist()], pa.list_(pa.int32()))
    unknown = samples.set_column(samples.column_names.index("input_ids"), "input_ids", ids)
    assert isinstance(proven_scorer("transformers", engine_config, unknown, Folder.at(tmp_path)), TransformersScorer)
    assert not Folder.at(tmp_path).list_files(".json")
