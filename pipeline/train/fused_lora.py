"""LoRA layers as one operation: x W^T + s (x A^T) B^T, added in place.

PEFT's layer makes the small product, its scaling and the sum tensors of their own, forward and backward, and takes its inputs to
the adapter's type first. On two CPU cores that costs a twelfth of a training step.

Shapes: N tokens, I in features, O out features, R rank.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse(model: nn.Module) -> None:
    """Let the LoRA layers of a PEFT model compute as one operation. Layers of other kinds, and those with dropout, stay."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and _is_plain(module):
            module.forward = partial(_forward, module)


def _is_plain(layer: Linear) -> bool:
    """Whether one adapter without dropout, bias or a variant such as DoRA is all that it adds."""
    names = layer.active_adapters
    return (
        len(names) == 1
        and not layer.lora_variant
        and not layer.lora_bias[names[0]]
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
    )


def _forward(layer: Linear, x: Tensor) -> Tensor:
    (name,) = layer.active_adapters
    base, a_RI, b_OR = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    result: Tensor = _Product.apply(x, base.weight, base.bias, a_RI, b_OR, layer.scaling[name])
    return result


class _Product(torch.autograd.Function):
    """Differentiable in x, A and B; the base layer is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        inner_NR = x_NI @ a_RI.t()
        y_NO = linear(x_NI, weight_OI, bias_O).addmm_(inner_NR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, inner_NR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x_NI, weight_OI, a_RI, b_OR, inner_NR = ctx.saved_tensors
        g_NO = gradient.reshape(-1, gradient.shape[-1])
        inner_g_NR = (g_NO @ b_OR).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (g_NO @ weight_OI).addmm_(inner_g_NR, a_RI).view(ctx.shape)
        to_b_OR = (g_NO.t() @ inner_NR).mul_(ctx.scale)
        return to_x, None, None, inner_g_NR.t() @ x_NI, to_b_OR, None
