"""Learned weights against the loss of the merged adapter, and their gradient against differences."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.basemodel import linear_shapes
from pipeline.engines.completion import collate, completion_logits, completion_targets
from pipeline.merge import learn
from pipeline.merge.adapter import read_adapter, write_adapter
from pipeline.merge.learn import add_donors, learn_weights
from pipeline.merge.recipes import Recipe, merge


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


def merged_loss(base: str, donors: list[Path], weights: tuple[float, ...], samples: pa.Table, scratch: Path) -> float:
    recipe = Recipe(tuple(map(str, donors)), weights, "exact", 10)
    write_adapter(scratch, merge(recipe, [read_adapter(donor) for donor in donors], base, linear_shapes(base)[0]).adapter)
    return loss(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(scratch)).get_base_model(), samples)


def test_donors_added_by_hooks_compute_what_their_merge_computes(
    tmp_path: Path, tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    samples = random_samples([12, 20, 31])
    weights = (0.7, -0.2, 0.4)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    weights_K = torch.tensor(weights, requires_grad=True)
    add_donors(model, [read_adapter(donor) for donor in donors], weights_K)
    assert loss(model, samples) == pytest.approx(merged_loss(tiny_base, donors, weights, samples, tmp_path), abs=1e-4)
    assert learn._loss(model, samples) == pytest.approx(loss(model, samples), abs=1e-5)
    assert weights_K.grad is not None
    for place in range(3):
        ends = []
        for step in (-0.01, 0.01):
            moved = tuple(w + step * (place == n) for n, w in enumerate(weights))
            ends.append(merged_loss(tiny_base, donors, moved, samples, tmp_path / f"{place}{step}"))
        assert float(weights_K.grad[place]) == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.05, abs=2e-3)


def test_learned_weights_are_better_than_equal_ones_and_may_be_negative(
    tmp_path: Path, tiny_base: str, donors: list[Path], random_samples: Callable[..., pa.Table]
) -> None:
    """Random donors harm: the weights fall."""
    samples = random_samples([12, 20, 31])
    learned = learn_weights(tiny_base, [str(donor) for donor in donors], samples, "float32")
    equal = merged_loss(tiny_base, donors, (1 / 3,) * 3, samples, tmp_path / "equal")
    assert merged_loss(tiny_base, donors, learned, samples, tmp_path / "learned") < equal
    assert min(learned) < 1 / 3
