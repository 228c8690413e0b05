"""Learned weights against the loss of the merged adapter, and their gradient against differences."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import Indexed, hash_of, read_adapter, write_adapter
from pipeline.merge import learned_weights
from pipeline.merge.learned_weights import add_donors, greedy_donors, learn_weights
from pipeline.merge.recipes import Recipe, merge
from pipeline.model.base_model import linear_shapes
from pipeline.model.completion_loss import collate, completion_logits, completion_nll, completion_targets


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, make_adapter: Callable[..., Path]) -> list[Path]:
    """Of unlike rank, scale and modules."""
    folder = tmp_path_factory.mktemp("donors")
    kinds = (
        {"rank": 2},
        {"rank": 5, "use_rslora": True, "targets": "all-linear"},
        {"rank": 3, "alpha": 1, "targets": ["up_proj"]},
    )
    return [make_adapter(folder / str(seed), tiny_base, **{"seed": seed, "std": 0.2} | kind) for seed, kind in enumerate(kinds)]


def loss(model: torch.nn.Module, samples: pa.Table) -> float:
    batch = collate(samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist(), torch.device("cpu"))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(completion_logits(model, batch), completion_targets(batch)))


def merged_loss(
    base: str, donors: list[Path], weights: tuple[float, ...], samples: pa.Table, scratch: Path, by_module: Any = None
) -> float:
    recipe = Recipe(tuple(map(str, donors)), weights, "exact", 10, module_weights=by_module)
    merged = merge(recipe, [read_adapter(donor, base=base) for donor in donors], base, linear_shapes(base)[0])
    write_adapter(scratch, merged.adapter, base=base)
    return loss(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(scratch)).get_base_model(), samples)


def test_donors_added_by_hooks_compute_what_their_merge_computes(
    tmp_path: Path, tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    samples = random_samples([12, 20, 31])
    weights = (0.7, -0.2, 0.4)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    weights_K = torch.tensor(weights, requires_grad=True)
    modules = add_donors(model, [read_adapter(donor) for donor in donors], weights_K.expand(14, 3))
    assert modules == sorted(linear_shapes(tiny_base)[0].keys() - {"lm_head"})
    assert loss(model, samples) == pytest.approx(merged_loss(tiny_base, donors, weights, samples, tmp_path), abs=1e-4)
    losses = list(learned_weights._losses(model, samples))
    assert sum(nll.item() for nll in losses) == pytest.approx(loss(model, samples), abs=1e-5)
    for nll in losses:
        nll.backward()
    assert weights_K.grad is not None
    for place in range(3):
        ends = []
        for step in (-0.01, 0.01):
            moved = tuple(w + step * (place == n) for n, w in enumerate(weights))
            ends.append(merged_loss(tiny_base, donors, moved, samples, tmp_path / f"{place}{step}"))
        assert float(weights_K.grad[place]) == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.05, abs=2e-3)


def test_layers_that_donors_change_whole_are_weighted_too(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], random_samples: Callable[..., pa.Table]
) -> None:
    kinds: list[dict[str, Any]] = [{"modules_to_save": ["embed_tokens", "model.norm"]}, {"trainable_token_indices": [3, 5, 9]}]
    whole = [make_adapter(tmp_path / str(seed), tiny_base, seed=seed, whole=0.2, **kind) for seed, kind in enumerate(kinds)]
    samples, weights = random_samples([12, 20, 31]), (0.7, -0.2)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    weights_K = torch.tensor(weights, requires_grad=True)
    modules = add_donors(model, [read_adapter(donor, base=tiny_base) for donor in whole], weights_K.expand(99, 2))
    names = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert names == {module for module in modules if module.endswith(".weight")}
    assert loss(model, samples) == pytest.approx(merged_loss(tiny_base, whole, weights, samples, tmp_path / "m"), abs=1e-4)
    for nll in learned_weights._losses(model, samples):
        nll.backward()
    assert weights_K.grad is not None
    ends = [merged_loss(tiny_base, whole, (0.7 + step, -0.2), samples, tmp_path / f"{step}") for step in (-0.01, 0.01)]
    assert float(weights_K.grad[0]) == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.05, abs=2e-3)
    indexed = [Indexed(str(donor), hash_of(donor)) for donor in whole]
    _, by_module = learn_weights(tiny_base, indexed, samples, by_module=True)
    assert by_module is not None
    assert by_module.keys() == set(modules)


def test_what_a_layer_adds_with_lies_where_the_layer_is(
    tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    """An index of the host's would be copied to a GPU in every layer of every pass."""
    meta, indices = torch.device("meta"), list[str]()
    model = AutoModelForCausalLM.from_pretrained(tiny_base).to(meta)
    add_donors(model, [read_adapter(donor) for donor in donors], torch.ones(14, 3, device=meta))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.index.Tensor:
                indices.extend(place.device.type for place in args[1] if place is not None)
            return function(*args, **(kwargs or {}))

    with Watch():
        model.get_decoder().layers[0].mlp.up_proj(torch.zeros(2, 128, device=meta))
    assert indices == ["meta"]


def test_learned_weights_are_better_than_equal_ones_and_may_be_negative(
    tmp_path: Path, tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    """Random donors harm: the weights fall."""
    samples = random_samples([12, 20, 31])
    indexed = [Indexed(str(donor), hash_of(donor)) for donor in donors]
    learned, none = learn_weights(tiny_base, indexed, samples, dtype="float32")
    equal = merged_loss(tiny_base, donors, (1 / 3,) * 3, samples, tmp_path / "equal")
    found = merged_loss(tiny_base, donors, learned, samples, tmp_path / "learned")
    assert found < equal
    assert min(learned) < 1 / 3
    assert none is None
    again, by_module = learn_weights(tiny_base, indexed, samples, by_module=True, dtype="float32")
    assert again == learned
    assert by_module is not None
    assert len(set(by_module.values())) > 1
    assert merged_loss(tiny_base, donors, learned, samples, tmp_path / "modules", by_module) < found


def test_where_memory_is_short_passes_are_smaller_and_weights_and_donors_the_same(
    tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, indexed = random_samples([60, 70, 80, 90]), [Indexed(str(donor), hash_of(donor)) for donor in donors]
    expected, chosen = (of(tiny_base, indexed, samples, dtype="float32") for of in (learn_weights, greedy_donors))
    tokens: list[int] = []

    def short_of_memory(model: Any, batch: Any) -> torch.Tensor:
        tokens.append(batch.ids_BT.numel())
        if tokens[-1] > 100:
            raise torch.OutOfMemoryError
        return completion_nll(model, batch)

    monkeypatch.setattr(learned_weights, "completion_nll", short_of_memory)
    (weights, none), same = (of(tiny_base, indexed, samples, dtype="float32") for of in (learn_weights, greedy_donors))
    assert max(tokens) > 100
    assert (weights, none) == (pytest.approx(expected[0], abs=1e-4), None)
    assert same == chosen
    monkeypatch.setattr(learned_weights, "FEWEST_TOKENS", 1024)
    with pytest.raises(torch.OutOfMemoryError):
        learn_weights(tiny_base, indexed, samples)


def test_greedy_takes_a_donor_only_if_the_loss_falls(
    tmp_path: Path, tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    """Against the losses of the merged adapters themselves."""
    samples = random_samples([12, 20, 31])
    contrary = tmp_path / "contrary"
    shutil.copytree(donors[0], contrary)
    file = contrary / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": -8}))  # takes away what the first donor spoils
    pool = [donors[0], donors[1], contrary]
    chosen = greedy_donors(tiny_base, [Indexed(str(donor), hash_of(donor)) for donor in pool], samples, "float32")

    def of(places: tuple[int, ...]) -> float:
        weights = tuple((place in places) / len(places) for place in range(3))
        return merged_loss(tiny_base, pool, weights, samples, tmp_path / "".join(map(str, places)))

    second, third = sorted((1, 2), key=lambda place: of((0, place)))
    assert of((0, second)) < of((0,))
    expected = (0, second, third) if of((0, second, third)) < of((0, second)) else (0, second)
    assert chosen == expected
