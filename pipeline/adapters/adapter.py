"""Reading, checking and writing PEFT LoRA adapters.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes it. What a stranger may have put
there is the business of `pipeline/adapters/validation.py`.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.adapters.fetch import fetch_adapter
from pipeline.adapters.low_rank import Factors, drop_null_rank, pad
from pipeline.adapters.peft_names import names_kept, require_applied
from pipeline.adapters.saved_layers import own_weights, trained_layers
from pipeline.adapters.target_modules import text_layers
from pipeline.adapters.tensor_names import PREFIX, adapted_beside
from pipeline.adapters.validation import check_declared, open_weights, read_declared, split_name
from pipeline.adapters.whole_layers import add_to_weights
from pipeline.core.base_ref import name_of
from pipeline.core.errors import AdapterError, as_adapter_error
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.model.base_model import Shapes, linear_shapes, names_of_others, skeleton

CHANGED = "it changed since the pool was indexed; the next run checks it anew"


class Indexed(NamedTuple):
    """Where an adapter is, and the `adapter_hash` that it had when its pool was indexed."""

    uri: str
    hash: str


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory: its PEFT config and, for each module path, lora_A (R, I) and lora_B (O, R).

    `own`: rank and alpha of the modules that have others than the config's r and lora_alpha. `whole`: what it adds to weights of
    layers that are saved whole, such as embeddings, by their names in the base; float32.
    """

    config: LoraConfig
    tensors: dict[str, tuple[Tensor, Tensor]]
    own: dict[str, tuple[int, float]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[str]:
        return sorted(self.tensors)

    @property
    def target_leaves(self) -> list[str]:
        """Last parts of the adapted module paths, e.g. q_proj."""
        return sorted({module.rpartition(".")[2] for module in self.tensors})

    @property
    def max_rank(self) -> int:
        return max(map(self.rank, self.tensors))

    def rank(self, module: str) -> int:
        return int(self.tensors[module][0].shape[0])

    def scale(self, module: str) -> float:
        """alpha / r of a module; alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank(module)
        _, alpha = self.own.get(module, (rank, float(self.config.lora_alpha)))
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def factors(self, module: str) -> Factors:
        """The module's delta weight in float32, the scale put into B."""
        a_RI, b_OR = self.tensors[module]
        return Factors(a_RI.float(), b_OR.float() * self.scale(module))


def read_adapter(folder: Path, shapes: Shapes | None = None, head: str | None = None, base: str | None = None) -> Adapter:
    """Read an adapter folder into memory, without layers for pictures and sounds.

    Args:
        shapes, head: linear layers and output head of the base model; an adapter that does not fit them is not read.
        base: the base model, with which layers that are saved whole are compared; without it they are left out.

    Raises:
        AdapterError: it is not a LoRA adapter that can be a donor; the message says why.
    """
    declared = read_declared(folder)
    if shapes is not None:
        check_declared(declared, shapes, head)
    halves: dict[tuple[str, str], Tensor] = {}
    try:
        with open_weights(folder / WEIGHTS_FILE) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name not in declared.saved:
                    halves[split_name(name)] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise as_adapter_error(error, f"corrupt weights: {WEIGHTS_FILE} cannot be read ({error})") from error
    if changed := [one for one in declared.other_senses if halves[one, "A"].any() and halves[one, "B"].any()]:
        raise AdapterError(f"changes layers for pictures or sounds ({changed[0]}), which no text runs through")
    tensors = {module: (halves[module, "A"], halves[module, "B"]) for module in declared.sizes}
    for module, pair in tensors.items():
        if not all(torch.isfinite(half).all() for half in pair):
            raise AdapterError(f"NaN or Inf in the weights of {module}")
    config = declared.config
    if adapted_beside(declared.saved):  # whose factors are among the whole layers from here on
        config = copy(config)
        config.target_modules, config.exclude_modules = set(tensors), None
    return Adapter(config, tensors, declared.own, trained_layers(folder, declared, base) if base else {})


def for_engine(folder: Path, scratch: Path) -> Path:
    """The folder of an adapter that an engine may read: itself, or where its config has patterns or unusual fields, the same
    delta weights written to `scratch` with a plain one. Whole layers are left out: they are no LoRA.

    Raises:
        AdapterError: as `read_adapter`.
    """
    if read_declared(folder).uniform:
        return folder
    write_adapter(scratch, plain(read_adapter(folder)))
    return scratch


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(weights_sha256: str, config: LoraConfig) -> str:
    """A digest that is equal for adapters of equal delta weights: of the weights and of what scales them."""
    scaling = (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern)
    meaning = (config.modules_to_save, config.trainable_token_indices, config.ensure_weight_tying)  # of whole layers
    layers = [value for value in meaning if value]
    return hashlib.sha256(f"{weights_sha256} {scaling}{layers or ''}".encode()).hexdigest()[:32]


def hash_of(folder: Path) -> str:
    """The `content_hash` of an adapter's folder.

    Raises:
        AdapterError: it is no LoRA adapter.
    """
    config = read_declared(folder).config
    try:
        return content_hash(file_sha256(folder / WEIGHTS_FILE), config)
    except OSError as error:
        raise as_adapter_error(error, f"corrupt weights: {WEIGHTS_FILE} cannot be read ({error})") from error


def require_hash(folder: Path, expected: str) -> None:
    """See to it that an adapter is still the one that was indexed: in between, hours may have passed.

    Raises:
        AdapterError: it is another one by now.
    """
    if hash_of(folder) != expected:
        raise AdapterError(CHANGED)


def read_indexed(one: Indexed, cache: Path, base: str) -> Adapter:
    """Read an adapter of a catalogue of adapters of this base, fetched to `cache` where it is elsewhere.

    Raises:
        AdapterError: it cannot be read, or is another one by now.
        OSError: not now, but perhaps later; see `errors.is_transient`.
    """
    folder = fetch_adapter(one.uri, cache)
    try:
        adapter = read_adapter(folder, base=base)
        require_hash(folder, one.hash)  # after it is read: it may change at any moment
    except AdapterError as error:
        raise AdapterError(f"{one.uri}: {error}") from error
    return adapter


def put_on(model: Any, folder: Path, base: str, **settings: Any) -> PeftModel:
    """The base model with the adapter of a local folder on its layers, all of it. PEFT alone would read the weights to the first
    GPU that it sees, which is another worker's where several share a node.

    Whole layers that come with the adapter are put in the place of the model's, for good, and are frozen: PEFT would train them.

    Raises:
        AdapterError: PEFT leaves out a part of it, or it is no LoRA adapter.
    """
    declared = read_declared(folder)
    with names_kept(), temporary_folder() as scratch:
        if declared.saved:
            write_adapter(scratch, read_adapter(folder))
        factors = str(scratch if declared.saved else folder)
        adapted = PeftModel.from_pretrained(model, factors, torch_device=str(model.device), **settings)
    require_applied(adapted, [*declared.sizes, *declared.other_senses])
    add_to_weights(adapted.get_base_model(), trained_layers(folder, declared, base))
    return adapted


def write_adapter(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32, base: str | None = None) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        base: the base model, to be given for an adapter with whole layers, which are written as they are with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, (a_RI, b_OR) in adapter.tensors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RI.to(dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_OR.to(dtype).contiguous()
    if adapter.whole:
        assert base, "the base, for the layers that are written whole"
        tensors |= {f"{PREFIX}{name}": weights.to(dtype).contiguous() for name, weights in _whole_layers(adapter, base).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy(adapter.config)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in adapter.whole}) or None
    config.trainable_token_indices = None
    config.save_pretrained(str(folder))


def _whole_layers(adapter: Adapter, base: str) -> dict[str, Tensor]:
    """All tensors of the layers that an adapter changes whole, with those that it leaves: PEFT reads no part of a layer."""
    found, model = dict[str, Tensor](), skeleton(base)
    for module in {name.rpartition(".")[0] for name in adapter.whole}:
        for name in (f"{module}.{leaf}" for leaf in model.get_submodule(module).state_dict()):
            own = own_weights(base, name)
            assert own is not None, f"{name} is to be written, and is no weight of {base}"
            found[name] = own.float() + adapter.whole.get(name, 0)
    return found


def with_whole(adapter: Adapter, changes: Mapping[str, Tensor], base: str) -> Adapter:
    """The adapter with changes of whole layers. What it adds to one of these by factors is added there: PEFT has the one or the
    other on a layer."""
    modules = {name.rpartition(".")[0] for name in changes} & adapter.tensors.keys()
    if not modules:
        return replace(adapter, whole=dict(changes))
    whole = dict(changes)
    for module in modules:
        name, delta = f"{module}.weight", adapter.factors(module).dense()
        whole[name] = whole[name] + delta if name in whole else delta
    kept = {module: pair for module, pair in adapter.tensors.items() if module not in modules}
    config = copy(adapter.config)
    config.target_modules = set(target_names(kept, base, linear_shapes(base)[0]))
    return replace(adapter, config=config, tensors=kept, whole=whole)


def from_factors(base: str, deltas: dict[str, Factors], rank: int, alpha: float, shapes: Shapes, seed: int) -> Adapter:
    """A plain PEFT adapter of one rank from delta weights; both factors carry the same share of the scale alpha / rank.

    A delta weight of a smaller rank is filled up with fresh rank, drawn with `seed`, that leaves it as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    root = (alpha / rank) ** 0.5
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for module, delta in deltas.items():
        full = pad(drop_null_rank(Factors(delta.a_RI / root, delta.b_OR / root)), rank, generator)
        tensors[module] = (full.a_RI, full.b_OR)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=target_names(deltas, base, shapes),
        base_model_name_or_path=name_of(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return Adapter(config, tensors)


def alpha_at(rank: int, usual_rank: int, usual_scale: float) -> float:
    """The alpha with which an adapter of this rank learns about as fast as one of the usual rank and scale (alpha / r), so that a
    learning rate means what it meant there: the scale falls with the root of the rank (rsLoRA, arXiv 2312.03732)."""
    return rank * usual_scale * math.sqrt(usual_rank / rank)


def plain(adapter: Adapter) -> Adapter:
    """The same delta weights with one rank, alpha = rank and modules by name, for engines that read no patterns."""
    rank = adapter.max_rank
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in adapter.modules:
        delta = adapter.factors(module)
        room = rank - delta.rank
        tensors[module] = (
            torch.nn.functional.pad(delta.a_RI, (0, 0, 0, room)),
            torch.nn.functional.pad(delta.b_OR, (0, room)),
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=adapter.modules, task_type="CAUSAL_LM")
    return Adapter(config, tensors, whole=adapter.whole)


def target_names(modules: Collection[str], base: str, shapes: Shapes) -> list[str]:
    """Leaf names where they name just these of the base's modules, else the full paths: altup_projections.0 is called what each
    first layer of a list is, and an encoder for pictures may have a module q_proj with a linear layer inside."""
    leaves = {module.rpartition(".")[2] for module in modules}
    covered = {name for name in shapes if name.rpartition(".")[2] in leaves}  # PEFT also looks at what is no linear layer
    return sorted(leaves) if covered == set(modules) and leaves.isdisjoint(names_of_others(base)) else sorted(modules)


def text_targets(names: Collection[str], base: str) -> list[str]:
    """What names the layers of text that such names mean in the base: no text would train those for pictures and sounds."""
    shapes, _ = linear_shapes(base)
    return target_names(text_layers(names, shapes), base, shapes)
