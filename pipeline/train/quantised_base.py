"""`train.quantize: nf4`: the frozen base in 4 bits while an adapter is trained on it (QLoRA, arXiv 2305.14314), by bitsandbytes.

Linear layers but the output head are in NF4 with double quantisation, 4.13 bits a weight, and compute in the type that
`train.dtype` says; all else is in float32, as PEFT prepares it. What is trained is an adapter of the plain base.
"""

from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from pipeline.adapters.adapter import put_on
from pipeline.config import TrainConfig
from pipeline.core.errors import InputError
from pipeline.model.base_model import device, load_model


def require_bitsandbytes(train: TrainConfig) -> None:
    """See that what quantises can be had, where it is asked for.

    Raises:
        InputError: it is not installed, or too old for transformers.
    """
    if train.quantize != "none" and not is_bitsandbytes_available():
        raise InputError(f"install bitsandbytes to use train.quantize {train.quantize}: pip install '.[quantize]'")


def load_quantised(base: str, products: torch.dtype, folded: Path | None = None) -> Any:
    """The base in 4 bits on this process' device, prepared for training.

    Args:
        products: the type that layers in 4 bits compute in.
        folded: the folder of an adapter that is added to the weights before they are quantised, which takes the host's memory for
            the whole base. To add it afterwards would mean to quantise twice.
    """
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=products
    )
    model = _with_folded(base, products, folded, bits) if folded else load_model(base, products, bits=bits)
    _keep_packing(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # who trains turns that on


def _with_folded(base: str, products: torch.dtype, folded: Path, bits: BitsAndBytesConfig) -> Any:
    plain = put_on(load_model(base, products, torch.device("cpu")), folded, base).merge_and_unload()
    name, weights = plain.name_or_path, plain.state_dict()
    model = type(plain).from_pretrained(
        None, config=plain.config, state_dict=weights, dtype=products, device_map={"": device()}, quantization_config=bits
    )
    model.name_or_path = model.config._name_or_path = name
    return model


def _keep_packing(model: Any) -> None:
    """Let layers compute in an evaluation as in training. On CPUs that multiply bfloat16, bitsandbytes packs the weights of one
    in evaluation mode anew, for an operation without gradients, which training then goes on with."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
