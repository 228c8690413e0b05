"""What a stranger's adapter declares of itself: its config, and the header of its weights file.

Read before memory is taken for weights. Nothing here runs a stranger's code: no pickle is opened, and sizes are bounded.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from pipeline.adapters.target_modules import own_scales, tails, targets
from pipeline.adapters.tensor_names import FACTOR, PREFIX, adapted_beside, saved_whole
from pipeline.config import MAX_RANK
from pipeline.core.errors import AdapterError, as_adapter_error
from pipeline.core.file_names import CONFIG_FILE, PICKLES, WEIGHTS_FILE
from pipeline.core.storage import MAX_HEADER_BYTES
from pipeline.model.base_model import Shapes
from pipeline.model.layer_names import HEADS, LANGUAGE, LAYERS, is_of_text, unwrapped

MAX_CONFIG_BYTES = 1 << 20
MAX_ALPHA = 1e9
MAX_TOKENS = 1 << 30
"""Of a vocabulary."""
MAX_NAME = 300
"""Characters of the name of a base model."""

DTYPES = ("F64", "F32", "F16", "BF16")

ROUTERS = ("gate", "router")
"""What models call the layer that sends a token to experts."""

PLAIN_NAME = re.compile(r"[\w.-]+")

# Config fields that change what B A means, in ways that neither the engines nor the merge compute.
UNSUPPORTED = {
    "use_dora": "DoRA: the magnitude vector is not a low-rank delta",
    "lora_bias": "lora_bias: biases are not part of a low-rank delta",
    "fan_in_fan_out": "fan_in_fan_out: transposed weights are not supported",
    "layer_replication": "layer_replication: it changes the base model's layers",
    "target_parameters": "target_parameters: it adapts expert layers or other bare parameters, which are not supported",
    "megatron_config": "megatron_config: Megatron layers are not supported",
    "use_qalora": "QALoRA: its pooled input is not a plain low-rank delta",
    "use_bdlora": "BD-LoRA: block-diagonal factors are not supported",
    "arrow_config": "Arrow: a router over adapters is not one adapter",
    "alora_invocation_tokens": "aLoRA: it acts on a part of the tokens alone",
    "monteclora_config": "MonteCLoRA: not a plain low-rank delta",
    "velora_config": "VeLoRA: not a plain low-rank delta",
    "kasa_config": "KaSA: not a plain low-rank delta",
}

KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations by name that leave the base's weights as they are. Others, such as PiSSA, subtract from them, so that B A alone
is not the delta, and PEFT does it again at each load."""

MLX_FIELDS = {"fine_tune_type", "lora_parameters"}

PLAIN_FIELDS = {"base_model_name_or_path", "inference_mode", "lora_alpha", "peft_type", "peft_version", "r", "target_modules"}
PLAIN_FIELDS |= {"exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout", "use_rslora"}
"""Fields of a config that an engine may see with other values than PEFT's own: they are checked here, or bear on nothing."""

Size = tuple[int, ...]


@dataclass(frozen=True)
class Declared:
    """What an adapter's files say, its weights not yet read.

    `sizes`: module path -> shapes of lora_A and of lora_B. `own`: rank and alpha of the modules for which a pattern of the
    config has one or both of them. `saved`: names of tensors of whole layers beside the factors, and of factors on embeddings and
    output heads, which change these as a whole. `renamed`: whether the file has
    tensors by other names than PEFT writes. `other_senses`: modules, not in `sizes`, that no text runs through.
    """

    config: LoraConfig
    sizes: dict[str, tuple[Size, Size]]
    own: dict[str, tuple[int, float]]
    saved: tuple[str, ...] = ()
    renamed: bool = False
    other_senses: tuple[str, ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether one rank and one alpha hold for all modules, these and no others are named, and the config says nothing else.
        vLLM reads no rank_pattern and no alpha_pattern, and no engine is to run a stranger's regular expression or to act on a
        field that nobody checked."""
        config, usual = vars(self.config), vars(LoraConfig(task_type="CAUSAL_LM"))
        named = {tail for module in self.sizes for tail in tails(module)}
        return (
            all(config[name] == usual[name] for name in usual.keys() - PLAIN_FIELDS)
            and not (self.own or self.saved or self.renamed or self.other_senses)
            and not isinstance(self.config.target_modules, str)
            and named.issuperset(self.config.target_modules)  # PEFT raises at what is no linear layer
            and not isinstance(self.config.exclude_modules, str)
        )

    def rank(self, module: str) -> int:
        """The rank that the config gives a module."""
        return self.own[module][0] if module in self.own else int(self.config.r)


def read_declared(folder: Path) -> Declared:
    """Read config and header of an adapter folder.

    Raises:
        AdapterError: it is not a LoRA adapter that can be a donor; the message says why.
    """
    config = _read_config(folder)
    sizes, saved, renamed = _read_names(folder)
    text = {module: pair for module, pair in sizes.items() if is_of_text(module)}
    other_senses = tuple(sorted(sizes.keys() - text.keys()))
    if not text:
        raise AdapterError(f"adapts layers for pictures or sounds alone ({other_senses[0]}), which no text runs through")
    return Declared(config, text, own_scales(config, [*text, *adapted_beside(saved)]), saved, renamed, other_senses)


def check_declared(declared: Declared, shapes: Shapes, head: str | None) -> None:
    """Check what an adapter declares against the linear layers of the base model.

    Raises:
        AdapterError: with the reason that it cannot be a donor.
    """
    shapes = {module: shape for module, shape in shapes.items() if is_of_text(module)}
    _require_linear(declared, shapes, head)
    for module, found in declared.sizes.items():
        rank, (out, inner) = declared.rank(module), shapes[module]
        if found != ((rank, inner), (out, rank)):
            raise AdapterError(
                f"wrong shapes: {module} has lora_A {found[0]}, lora_B {found[1]}; base and rank {rank} need "
                f"{(rank, inner)} and {(out, rank)}"
            )
    targeted = targets(declared.config, shapes, head)
    if missing := sorted(targeted - declared.sizes.keys()):
        raise AdapterError(f"missing weights: its config targets {missing[0]} but the file has no lora_A and lora_B for it")
    beside = adapted_beside(declared.saved)
    if beside and declared.config.target_modules != "all-linear":  # which leaves out the head
        named = targets(declared.config, dict.fromkeys(beside, (0, 0)), None)
        targeted |= beside if named and declared.config.ensure_weight_tying else named  # a head that PEFT ties goes unnamed
    if beyond := sorted((declared.sizes.keys() | beside) - targeted):  # PEFT passes these over, and vLLM does not
        raise AdapterError(f"its file has weights for {beyond[0]}, which its config does not target")


def _require_linear(declared: Declared, shapes: Shapes, head: str | None) -> None:
    """See to it that an adapter's modules are linear layers of the base, other than its output head."""
    unknown = sorted(declared.sizes.keys() - shapes)
    if found := next((module for module in declared.sizes if module == head or module.rpartition(".")[2] in HEADS), None):
        raise AdapterError(f"adapts the output head ({found}), which cannot be scored under vLLM's LoRA")
    if found := next((module for module in unknown if "experts" in module.split(".")), None):
        raise AdapterError(f"adapts expert layers ({found}), which are not supported")
    if found := next((module for module in unknown if module.rpartition(".")[2] in ROUTERS), None):
        raise AdapterError(f"adapts the router to expert layers ({found}), which is not supported")
    if unknown:
        raise AdapterError(f"wrong base: it adapts {unknown[0]}, which the base model does not have as a linear layer")


def called_otherwise(declared: Declared, shapes: Shapes) -> tuple[str, str] | None:
    """What the paths of an adapter's layers begin with and what those of the base do, where this is all that differs: a model
    with an encoder for pictures has its language model in another place in each version of transformers. Else None."""
    first = next(iter(declared.sizes))
    if not declared.sizes.keys().isdisjoint(shapes) or not (found := LAYERS.search(first)):
        return None
    theirs, tail = first[: found.start()], first[found.start() :]
    beginnings = {name.removesuffix(tail) for name in shapes if name.endswith(tail)}
    beginnings = {ours for ours in beginnings if {*ours.split("."), *theirs.split(".")} - {""} <= LANGUAGE}
    fit = [ours for ours in beginnings if all(_fits(declared, module, theirs, ours, shapes) for module in declared.sizes)]
    return (theirs, fit[0]) if len(fit) == 1 else None


def _fits(declared: Declared, module: str, theirs: str, ours: str, shapes: Shapes) -> bool:
    """Whether an adapter's module is one of the base's by its name, begun otherwise, and by its features."""
    (_, inner), (out, _) = declared.sizes[module]
    return module.startswith(theirs) and shapes.get(ours + module.removeprefix(theirs)) == (out, inner)


def as_called(shapes: Shapes, beginnings: tuple[str, str] | None) -> Shapes:
    """The base's layers by the names that an adapter gives them."""
    if beginnings is None:
        return shapes
    theirs, ours = beginnings
    return {theirs + name.removeprefix(ours) if name.startswith(ours) else name: shape for name, shape in shapes.items()}


def largest_adapter(shapes: Shapes) -> int:
    """Bytes of the largest adapter of a base that can be a donor: factors of the highest rank in float64 on all linear layers,
    beside header, config and card."""
    return 8 * MAX_RANK * sum(out + inner for out, inner in shapes.values()) + MAX_HEADER_BYTES + 2 * MAX_CONFIG_BYTES


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file, of which no more than its header is then in memory.

    Raises:
        AdapterError: it is corrupt, or its header is larger than any honest one.
    """
    if not path.is_file():  # a pipe would be waited for
        raise AdapterError(f"corrupt weights: {path.name} is no file")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise AdapterError(
                f"corrupt weights: {path.name} declares a header of {header} bytes; {MAX_HEADER_BYTES} are allowed"
            )
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise as_adapter_error(error, f"corrupt weights: {path.name} cannot be read ({error})") from error


def check_dtype(name: str, dtype: str) -> None:
    """Check the type of a tensor's numbers, as a safetensors header spells it.

    Raises:
        AdapterError: it is no floating point type that can be computed with.
    """
    if dtype not in DTYPES:
        raise AdapterError(f"corrupt weights: {name} has dtype {dtype}, one of {', '.join(DTYPES)} is needed")


def split_name(name: str) -> tuple[str, str]:
    """The module of a tensor in an adapter's file, and which factor it is, A or B.

    Raises:
        AdapterError: it is neither.
    """
    if ".lora_magnitude_vector" in name:
        raise AdapterError(UNSUPPORTED["use_dora"])
    plain = unwrapped(name)
    if plain.startswith(PREFIX) and (found := FACTOR.fullmatch(plain.removeprefix(PREFIX))):
        return found["module"], found["half"]
    raise AdapterError(f"not plain LoRA: it carries the tensor {name}")


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(_pickle(folder) or f"{CONFIG_FILE} is missing")
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise AdapterError(f"corrupt config: {CONFIG_FILE} has {size} bytes; {MAX_CONFIG_BYTES} are allowed")
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"corrupt config: {CONFIG_FILE} is not valid JSON ({error})") from error
    except OSError as error:
        raise as_adapter_error(error, f"{CONFIG_FILE} cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"corrupt config: {CONFIG_FILE} holds no JSON object")
    _check_config(content)
    known = {key: value for key, value in content.items() if key in LoraConfig.__dataclass_fields__}
    try:
        return LoraConfig(**known)
    except Exception as error:  # of whatever kind: PEFT trusts its configs
        raise AdapterError(f"corrupt config: PEFT does not accept it ({error})") from error


def unknown_fields(folder: Path) -> list[str]:
    """Fields that an adapter's config sets and that this version of PEFT does not know: those of a newer one, say."""
    content = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    return sorted(name for name, value in content.items() if value and name not in LoraConfig.__dataclass_fields__)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that stands there twice, one reader takes the first value and another the last."""
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _check_config(content: dict[str, Any]) -> None:
    if content.keys() & MLX_FIELDS:
        raise AdapterError("MLX: an adapter of mlx_lm, in a form of its own; convert it to PEFT")
    if content.get("peft_type") != "LORA":
        raise AdapterError(f"not LoRA: peft_type is {content.get('peft_type')!r}")
    for field, reason in UNSUPPORTED.items():
        if content.get(field):
            raise AdapterError(reason)
    if (content.get("bias") or "none") != "none":
        raise AdapterError(f"bias={content['bias']!r}: biases are not part of a low-rank delta")
    if not _is_rank(content.get("r")):
        raise AdapterError(f"corrupt config: r is {content.get('r')!r}, a whole number from 1 to {MAX_RANK} is needed")
    if not _is_number(alpha := content.get("lora_alpha")):
        raise AdapterError(f"corrupt config: lora_alpha is {alpha!r}, a number below {MAX_ALPHA:.0e} is needed")
    if not (_is_number(dropout := content.get("lora_dropout", 0.0)) and 0 <= dropout < 1):
        raise AdapterError(f"corrupt config: lora_dropout is {dropout!r}, a number from 0 to below 1 is needed")
    if not isinstance(rslora := content.get("use_rslora"), bool | None):
        raise AdapterError(f"corrupt config: use_rslora is {rslora!r}, true or false is needed")
    _check_pattern(content, "rank_pattern", _is_rank, f"whole numbers from 1 to {MAX_RANK}")
    _check_pattern(content, "alpha_pattern", _is_number, "numbers")
    _check_modules(content)
    _check_tokens(content.get("trainable_token_indices"))
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in KEEPS_BASE:
        raise AdapterError(f"init_lora_weights={init!r}: it changes the base weights; save it with PEFT's conversion to LoRA")
    base = content.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and base.isprintable() and len(base) <= MAX_NAME):
        raise AdapterError(f"corrupt config: base_model_name_or_path is {base!r}")


def _check_pattern(content: dict[str, Any], field: str, is_right: Any, wanted: str) -> None:
    pattern = content.get(field) or {}
    if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
        raise AdapterError(f"corrupt config: {field} is {pattern!r}, module patterns with {wanted} are needed")


def _check_modules(content: dict[str, Any]) -> None:
    """Fields that say which modules are adapted: names, or a regular expression."""
    if not _is_names(targets := content.get("target_modules")):
        raise AdapterError(f"corrupt config: target_modules is {targets!r}, names or a regular expression are needed")
    if not _is_names(excluded := content.get("exclude_modules") or []):
        raise AdapterError(f"corrupt config: exclude_modules is {excluded!r}, names or a regular expression are needed")
    layers = content.get("layers_to_transform")
    if not (layers is None or _is_layer(layers) or (isinstance(layers, list) and all(map(_is_layer, layers)))):
        raise AdapterError(f"corrupt config: layers_to_transform is {layers!r}, layer numbers are needed")
    pattern = content.get("layers_pattern") or []
    names = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(names, list) or not all(isinstance(name, str) and PLAIN_NAME.fullmatch(name) for name in names):
        raise AdapterError(f"corrupt config: layers_pattern is {pattern!r}, plain names are needed")


def _check_tokens(asked: Any) -> None:
    """`trainable_token_indices`: indices into the embeddings, or those of each of several layers."""
    lists = asked.values() if isinstance(asked, dict) else [asked or []]
    if not all(isinstance(one, list) and all(map(_is_token, one)) for one in lists):
        raise AdapterError("corrupt config: trainable_token_indices is no list of token ids, nor one for each of several layers")


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10_000


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ALPHA


def _read_names(folder: Path) -> tuple[dict[str, tuple[Size, Size]], tuple[str, ...], bool]:
    """Module -> shapes of lora_A and lora_B; tensors that are saved whole; whether names are others than PEFT writes. From the
    header alone."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(_pickle(folder) or f"missing weights: no {WEIGHTS_FILE}")
    halves: dict[str, dict[str, Size]] = {}
    saved, renamed = list[str](), False
    with open_weights(folder / WEIGHTS_FILE) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_slice(name)
            check_dtype(name, tensor.get_dtype())
            if saved_whole(name):
                saved.append(name)
                continue
            module, half = split_name(name)
            renamed |= name != f"{PREFIX}{module}.lora_{half}.weight"
            if half in halves.get(module, {}):
                raise AdapterError(f"corrupt weights: {module} has lora_{half} twice, under two names")
            if len(shape := tuple(tensor.get_shape())) != 2 and is_of_text(module):
                raise AdapterError(f"wrong shapes: {name} has {len(shape)} dimensions, 2 are needed")
            halves.setdefault(module, {})[half] = shape
    if not halves:
        what = f"no factors of a linear layer beside {saved[0]}" if saved else "no tensor"
        raise AdapterError(f"missing weights: the file holds {what}")
    for module, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"missing weights: {module} has only lora_{next(iter(pair))}")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}, tuple(saved), renamed


def _pickle(folder: Path) -> str | None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    return f"pickle: {pickles[0]} is never opened; save it as safetensors" if pickles else None
