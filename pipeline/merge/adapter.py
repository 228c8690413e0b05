"""Reading, checking and writing PEFT LoRA adapters.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes it. Reading never runs
code: no pickle is opened.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.basemodel import Shapes
from pipeline.errors import AdapterError
from pipeline.merge.delta import Factors, pad

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = [CONFIG_FILE, WEIGHTS_FILE, "README.md"]
PREFIX = "base_model.model."

# Config fields that change what B A means, in ways that neither the engines nor the merge compute.
UNSUPPORTED = {
    "use_dora": "DoRA: the magnitude vector is not a low-rank delta",
    "lora_bias": "lora_bias: biases are not part of a low-rank delta",
    "fan_in_fan_out": "fan_in_fan_out: transposed weights are not supported",
    "layer_replication": "layer_replication: it changes the base model's layers",
    "trainable_token_indices": "trainable_token_indices: it changes the embeddings",
    "target_parameters": "target_parameters: only linear layers are supported",
    "megatron_config": "megatron_config: Megatron layers are not supported",
    "use_qalora": "QALoRA: its pooled input is not a plain low-rank delta",
    "use_bdlora": "BD-LoRA: block-diagonal factors are not supported",
    "arrow_config": "Arrow: a router over adapters is not one adapter",
    "alora_invocation_tokens": "aLoRA: it acts on a part of the tokens alone",
    "monteclora_config": "MonteCLoRA: not a plain low-rank delta",
    "velora_config": "VeLoRA: not a plain low-rank delta",
    "kasa_config": "KaSA: not a plain low-rank delta",
}

CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that subtract from the base's weights, so that B A alone is not the delta; PEFT does it again at each load."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory: its PEFT config and, for each module path, lora_A (R, I) and lora_B (O, R)."""

    config: LoraConfig
    tensors: dict[str, tuple[Tensor, Tensor]]

    @cached_property
    def modules(self) -> list[str]:
        return sorted(self.tensors)

    @property
    def target_leaves(self) -> list[str]:
        """Last parts of the adapted module paths, e.g. q_proj."""
        return sorted({module.rpartition(".")[2] for module in self.tensors})

    @property
    def max_rank(self) -> int:
        return max(a_RI.shape[0] for a_RI, _ in self.tensors.values())

    @property
    def uniform(self) -> bool:
        """Whether one rank and one alpha hold for all modules. vLLM reads no rank_pattern and no alpha_pattern."""
        return not self.config.rank_pattern and not self.config.alpha_pattern

    def rank(self, module: str) -> int:
        """The rank that the config gives a module."""
        pattern = self.config.rank_pattern or {}
        return int(pattern.get(get_pattern_key(pattern.keys(), module), self.config.r))

    def scale(self, module: str) -> float:
        """alpha / r of a module; alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        pattern = self.config.alpha_pattern or {}
        alpha = float(pattern.get(get_pattern_key(pattern.keys(), module), self.config.lora_alpha))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def factors(self, module: str) -> Factors:
        """The module's delta weight in float32, the scale put into B."""
        a_RI, b_OR = self.tensors[module]
        return Factors(a_RI.float(), b_OR.float() * self.scale(module))


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder into memory.

    Raises:
        AdapterError: it is not a LoRA adapter that can be a donor; the message says why.
    """
    config = _read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(_missing_weights(folder))
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"corrupt weights: {WEIGHTS_FILE} cannot be read ({error})") from error
    return Adapter(config, _pair(tensors))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(weights_sha256: str, config: LoraConfig) -> str:
    """A digest that is equal for adapters of equal delta weights: of the weights and of what scales them."""
    scaling = (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern)
    return hashlib.sha256(f"{weights_sha256} {scaling}".encode()).hexdigest()[:32]


def check_adapter(adapter: Adapter, shapes: Shapes, head: str | None) -> None:
    """Check an adapter against the linear layers of the base model.

    Raises:
        AdapterError: with the reason that it cannot be a donor.
    """
    for module in adapter.modules:
        if module == head or module.rpartition(".")[2] in ("lm_head", "embed_out"):
            raise AdapterError(f"adapts the output head ({module}), which cannot be scored under vLLM's LoRA")
        if module not in shapes:
            raise AdapterError(f"wrong base: it adapts {module}, which the base model does not have as a linear layer")
        _check_module(adapter, module, shapes[module])
    missing = sorted(_targets(adapter.config, shapes, head) - set(adapter.modules))
    if missing:
        raise AdapterError(f"missing weights: its config targets {missing[0]} but the file has no lora_A and lora_B for it")


def write_adapter(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, (a_RI, b_OR) in adapter.tensors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RI.to(dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_OR.to(dtype).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    adapter.config.save_pretrained(str(folder))


def from_factors(base: str, deltas: dict[str, Factors], rank: int, alpha: float, shapes: Shapes, seed: int) -> Adapter:
    """A plain PEFT adapter of one rank from delta weights; both factors carry the same share of the scale alpha / rank.

    A delta weight of a smaller rank is filled up with fresh rank, drawn with `seed`, that leaves it as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    root = (alpha / rank) ** 0.5
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for module, delta in deltas.items():
        full = pad(Factors(delta.a_RI / root, delta.b_OR / root), rank, generator)
        tensors[module] = (full.a_RI, full.b_OR)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=_target_modules(list(deltas), shapes),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return Adapter(config, tensors)


def plain(adapter: Adapter) -> Adapter:
    """The same delta weights with one rank and alpha = rank, for engines that read no rank_pattern or alpha_pattern."""
    rank = adapter.max_rank
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in adapter.modules:
        delta = adapter.factors(module)
        room = rank - delta.rank
        tensors[module] = (
            torch.nn.functional.pad(delta.a_RI, (0, 0, 0, room)),
            torch.nn.functional.pad(delta.b_OR, (0, room)),
        )
    config = replace(adapter.config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    return Adapter(config, tensors)


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{CONFIG_FILE} is missing")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"corrupt config: {CONFIG_FILE} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"corrupt config: {CONFIG_FILE} holds no JSON object")
    _check_config(content)
    known = {key: value for key, value in content.items() if key in LoraConfig.__dataclass_fields__}
    try:
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"corrupt config: PEFT does not accept it ({error})") from error


def _check_config(content: dict[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise AdapterError(f"not LoRA: peft_type is {content.get('peft_type')!r}")
    for field, reason in UNSUPPORTED.items():
        if content.get(field):
            raise AdapterError(reason)
    if content.get("modules_to_save"):
        raise AdapterError(f"modules_to_save: it replaces whole modules ({content['modules_to_save']})")
    if content.get("bias", "none") != "none":
        raise AdapterError(f"bias={content['bias']!r}: biases are not part of a low-rank delta")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"corrupt config: r is {rank!r}, a positive whole number is needed")
    if not _is_number(alpha):
        raise AdapterError(f"corrupt config: lora_alpha is {str(alpha)[:40]!r}, a number is needed")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = content.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise AdapterError(f"corrupt config: {field} is {pattern!r}, module patterns with numbers are needed")
    if any(value < 1 for value in (content.get("rank_pattern") or {}).values()):
        raise AdapterError(f"corrupt config: rank_pattern is {content['rank_pattern']!r}, positive ranks are needed")
    _check_targets(content.get("target_modules"))
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise AdapterError(f"init_lora_weights={init!r}: it changes the base weights; save it with PEFT's conversion to LoRA")
    if not isinstance(content.get("base_model_name_or_path"), str | None):
        raise AdapterError(f"corrupt config: base_model_name_or_path is {content['base_model_name_or_path']!r}")


def _check_targets(targets: Any) -> None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise AdapterError(f"corrupt config: target_modules {targets!r} is no regular expression ({error})") from error
    elif not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(f"corrupt config: target_modules is {targets!r}, names or a regular expression are needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _missing_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        return f"pickle: {pickles[0]} is never opened; save the adapter as {WEIGHTS_FILE}"
    return f"missing weights: no {WEIGHTS_FILE}"


def _pair(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of each module."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, half = _split_name(name)
        if not tensor.is_floating_point():
            raise AdapterError(f"corrupt weights: {name} has dtype {tensor.dtype}, floating point is needed")
        if tensor.ndim != 2:
            raise AdapterError(f"wrong shapes: {name} has {tensor.ndim} dimensions, 2 are needed")
        halves.setdefault(module, {})[half] = tensor
    if not halves:
        raise AdapterError("missing weights: the file holds no tensor")
    for module, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"missing weights: {module} has only lora_{next(iter(pair))}")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _split_name(name: str) -> tuple[str, str]:
    if "lora_embedding_" in name or "embed_tokens" in name or "lm_head" in name:
        raise AdapterError(f"changes the embeddings or the output head ({name}), which vLLM's LoRA cannot score")
    if ".lora_magnitude_vector" in name:
        raise AdapterError(UNSUPPORTED["use_dora"])
    for half in ("A", "B"):
        tail = f".lora_{half}.weight"
        if name.startswith(PREFIX) and name.endswith(tail):
            return name.removeprefix(PREFIX).removesuffix(tail), half
    raise AdapterError(f"not plain LoRA: it carries the tensor {name}")


def _check_module(adapter: Adapter, module: str, shape: tuple[int, int]) -> None:
    a_RI, b_OR = adapter.tensors[module]
    rank = adapter.rank(module)
    expected = (rank, shape[1]), (shape[0], rank)
    if (tuple(a_RI.shape), tuple(b_OR.shape)) != expected:
        found = f"lora_A {tuple(a_RI.shape)}, lora_B {tuple(b_OR.shape)}"
        raise AdapterError(f"wrong shapes: {module} has {found}; base and rank {rank} need {expected[0]} and {expected[1]}")
    if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
        raise AdapterError(f"NaN or Inf in the weights of {module}")


def _targets(config: LoraConfig, shapes: Shapes, head: str | None) -> set[str]:
    """The linear layers that a config's target_modules name, by PEFT's own rule."""
    if config.target_modules == "all-linear":
        return set(shapes) - {head}
    return {name for name in shapes if name != head and check_target_module_exists(config, name)}


def _target_modules(modules: list[str], shapes: Shapes) -> list[str]:
    """Leaf names where they name just these modules in the base, else the full paths."""
    leaves = {module.rpartition(".")[2] for module in modules}
    covered = {name for name in shapes if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if covered == set(modules) else sorted(modules)
