"""Layers of a model that are changed whole, tied ones and quantised ones among them."""

import pytest
import torch
from torch import nn

from pipeline.adapters.whole_layers import add_to_weights, changed
from pipeline.core.errors import AdapterError
from pipeline.model.base_model import load_model

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def test_weights_are_others_within_and_the_same_objects_again_after(tiny_base: str) -> None:
    model = load_model(tiny_base, torch.bfloat16)
    before = dict(model.named_parameters(remove_duplicate=False))
    changes = {name: torch.full(before[name].shape, 0.5) for name in (HEAD, NORM)}
    with changed(model, changes):
        within = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in within.items():
            expected = (before[name].float() + 0.5).bfloat16() if name in changes else before[name]
            assert torch.equal(weight, expected)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is weight for name, weight in before.items())


@pytest.mark.parametrize("alike", [True, False])
def test_a_tied_head_stays_tied_where_its_change_is_the_embeddings(alike: bool, tiny_base: str) -> None:
    model = load_model(tiny_base, torch.float32)
    size = model.lm_head.weight.shape
    add_to_weights(model, {EMBEDDING: torch.ones(size), HEAD: torch.ones(size) if alike else torch.zeros(size)})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == alike


def test_a_quantised_layer_is_told_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    before = model[0].weight
    with pytest.raises(AdapterError, match=r"replaces 1\.weight, which is quantised here: use merge\.method: fold"):
        add_to_weights(model, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
    assert model[0].weight is before
