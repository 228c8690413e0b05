"""LoRA layers as one operation, against PEFT's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pipeline.train.fused_lora import fuse


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x).sin()
        return self.second(hidden)  # type: ignore[no-any-return]


def layers(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], init_lora_weights=False, **settings)
    return get_peft_model(Net(), config)


@pytest.mark.parametrize("rows", [(7,), (2, 5)])
@pytest.mark.parametrize("scaling", [{}, {"use_rslora": True}])
def test_values_and_gradients_are_pefts(rows: tuple[int, ...], scaling: dict[str, bool]) -> None:
    theirs = layers(**scaling).double()
    ours = copy.deepcopy(theirs)
    fuse(ours)
    found = []
    for model in (theirs, ours):
        x = torch.randn(*rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)])
    assert len(found[0]) == 6
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_base_in_bfloat16_keeps_its_type_and_the_adapter_gets_float32_gradients() -> None:
    model = layers()
    model.get_base_model().first.base_layer.to(torch.bfloat16)
    layer = model.get_base_model().first
    fuse(model)
    y = layer(torch.randn(4, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_layers_stay_pefts(settings: dict[str, object]) -> None:
    model = layers(**settings)
    before = model.get_base_model().first.forward
    fuse(model)
    assert model.get_base_model().first.forward == before
