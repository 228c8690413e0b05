"""The first-order screen against plain autograd and against losses of adapters that are turned up a little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import WEIGHTS_FILE, Adapter, read_adapter, write_adapter
from pipeline.core.tables import BASE_ID
from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.engines.transformers import TransformersScorer
from pipeline.model.base_model import linear_shapes, load_model
from pipeline.search import screen
from pipeline.search.screen import SCREEN, first_order, screen_pool, touched_modules, weight_gradients

Make = Callable[..., Path]
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"targets": "all-linear", "rank": 2},
    "rslora": {"rank": 9, "use_rslora": True, "targets": ["k_proj", "o_proj", "down_proj"]},
    "rank_pattern": {"rank": 4, "rank_pattern": {"q_proj": 12}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.fixture(scope="module")
def samples(random_samples: Callable[..., pa.Table]) -> pa.Table:
    return random_samples(range(8, 33, 5))


@pytest.fixture(scope="module")
def gradients(tiny_base: str, samples: pa.Table) -> screen.Gradients:
    return weight_gradients(load_model(tiny_base, torch.float32), samples, touched_modules(tiny_base, [LEAVES]))


@pytest.fixture(scope="module")
def scorer(tiny_base: str) -> TransformersScorer:
    return TransformersScorer(EngineConfig(tiny_base, "float32", 12, tuple(LEAVES), max_tokens=64, adapters_per_batch=1))


def dense_gradients(base: str, samples: pa.Table) -> dict[str, torch.Tensor]:
    """By backward() through the full logits of each row alone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    nll, n_tokens = torch.zeros(()), 0
    for row in samples.to_pylist():
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"])[1:]
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)[mask]
        nll = nll - logp.gather(1, ids[0, 1:][mask][:, None]).sum()
        n_tokens += int(mask.sum())
    (nll / n_tokens).backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def mean_nll(scorer: TransformersScorer, folder: Path | None, samples: pa.Table) -> float:
    scores = scorer.score([Candidate(BASE_ID, folder)], samples).to_pydict()
    return float(sum(scores["nll_sum"]) / sum(scores["n_tokens"]))


def times(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(adapter.config, {name: (a_RI, factor * b_OR) for name, (a_RI, b_OR) in adapter.tensors.items()})


def test_only_adapted_layers_are_touched_and_never_the_head(tiny_base: str, untied_base: str) -> None:
    for base in (tiny_base, untied_base):
        modules = touched_modules(base, [["q_proj"], None, ["down_proj", "lm_head"]])
        layers = ("model.layers.0", "model.layers.1")
        assert sorted(modules) == sorted(f"{layer}.{leaf}" for layer in layers for leaf in ("self_attn.q_proj", "mlp.down_proj"))


@pytest.mark.parametrize("batch_tokens", [1, 40, 1024])
def test_gradients_equal_autograd_through_full_logits(
    tiny_base: str, samples: pa.Table, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "BATCH_TOKENS", batch_tokens)
    expected = dense_gradients(tiny_base, samples)
    modules = [name for name in linear_shapes(tiny_base)[0] if name.endswith(("v_proj", "gate_proj"))]
    found = weight_gradients(load_model(tiny_base, torch.float32), samples, modules)
    assert sorted(found) == sorted(modules)
    assert min(float(gradient.norm()) for gradient in found.values()) > 1e-3
    for module in modules:
        torch.testing.assert_close(found[module], expected[module], rtol=1e-3, atol=1e-6)


def test_gradients_of_a_bfloat16_base_are_float32(tiny_base: str, samples: pa.Table, gradients: screen.Gradients) -> None:
    found = weight_gradients(load_model(tiny_base, torch.bfloat16), samples, gradients)
    for module, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), gradients[module].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_the_derivative_of_the_loss_at_scale_zero(
    kind: str,
    tmp_path: Path,
    tiny_base: str,
    make_adapter: Make,
    samples: pa.Table,
    gradients: screen.Gradients,
    scorer: TransformersScorer,
) -> None:
    adapter = read_adapter(make_adapter(tmp_path / kind, tiny_base, seed=5, **KINDS[kind]))
    step = 0.02
    write_adapter(tmp_path / "up", times(adapter, step))
    write_adapter(tmp_path / "down", times(adapter, -step))
    rise = mean_nll(scorer, tmp_path / "up", samples) - mean_nll(scorer, tmp_path / "down", samples)
    estimate = first_order(gradients, adapter)
    assert abs(estimate) > 0.005
    assert estimate == pytest.approx(rise / (2 * step), rel=0.02)


def test_first_order_is_linear_in_the_delta_weight(
    tmp_path: Path, tiny_base: str, make_adapter: Make, gradients: screen.Gradients
) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a", tiny_base, std=0.3))
    estimate = first_order(gradients, adapter)
    assert first_order(gradients, times(adapter, -2)) == pytest.approx(-2 * estimate, rel=1e-4)
    delta = {name: adapter.factors(name).dense() for name in adapter.modules}
    assert estimate == pytest.approx(sum(float((gradients[name] * delta[name]).sum()) for name in delta), rel=1e-4)


@pytest.mark.usefixtures("ray_session")
def test_a_broken_adapter_gets_a_null_and_stops_nothing(
    tmp_path: Path, tiny_base: str, make_adapter: Make, samples: pa.Table, gradients: screen.Gradients
) -> None:
    folders = {name: make_adapter(tmp_path / name, tiny_base, std=0.3, seed=7, **kind) for name, kind in KINDS.items()}
    broken = {name: make_adapter(tmp_path / name, tiny_base, seed=8) for name in ("corrupt", "not-finite", "misshapen")}
    (broken["corrupt"] / WEIGHTS_FILE).write_bytes(b"no tensors here")
    tensors = load_file(broken["not-finite"] / WEIGHTS_FILE)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, broken["not-finite"] / WEIGHTS_FILE)
    tensors = load_file(broken["misshapen"] / WEIGHTS_FILE)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, broken["misshapen"] / WEIGHTS_FILE)
    uris = {name: str(folder) for name, folder in (folders | broken).items()} | {"absent": str(tmp_path / "absent")}
    catalogue = pa.table({"adapter_id": list(uris), "uri": list(uris.values()), "target_modules": [LEAVES] * len(uris)})

    found = screen_pool(catalogue, tiny_base, samples, "float32")
    assert found.schema == SCREEN
    assert found["adapter_id"].to_pylist() == sorted(uris)
    values = dict(zip(*(found[name].to_pylist() for name in SCREEN.names), strict=True))
    assert {name for name, value in values.items() if value is None} == {*broken, "absent"}
    for name, folder in folders.items():
        assert values[name] == pytest.approx(first_order(gradients, read_adapter(folder)), rel=1e-3)
