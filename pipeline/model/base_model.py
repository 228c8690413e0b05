"""The base model: its config, tokenizer, weights and the shapes of its linear layers."""

import hashlib
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.core import node_folder
from pipeline.core.base_ref import is_stored, looks_local, name_of, pinned, split, state_of
from pipeline.core.errors import InputError, first_line, one_line, unknown_base
from pipeline.core.file_names import CONFIG_FILE
from pipeline.core.hub import HubBusyError, from_hub
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.model.layer_names import EMBEDDING_NAMES, own_name
from pipeline.model.rope import forget_lengths

FIRST_VALUES = 256

QUANTISED_NAME = re.compile(r"(-unsloth)?(-bnb)?-(4bit|8bit|int4|int8|gptq.*|awq.*|fp8.*|nf4|w\da\d+.*)$", re.IGNORECASE)
"""What the names of bases in fewer bits end in."""

DESCRIBING, WEIGHTS = (".json", ".jinja", ".model", ".txt", ".tiktoken"), (".safetensors",)
"""What is fetched of a base in an object store; never pickle."""

Shapes = dict[str, tuple[int, int]]
"""Module path, as in `model.layers.0.self_attn.q_proj` -> (out features, in features)."""


def linear_shapes(base: str) -> tuple[Shapes, str | None]:
    """Shapes of the base model's linear layers, and the path of its output head, from its config alone.

    Raises:
        InputError: the base model is not known.
    """
    _require_whole(base)
    model = skeleton(base)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    head_name = next((name for name, module in layers.items() if module is head), None)
    return {name: (module.out_features, module.in_features) for name, module in layers.items()}, head_name


@lru_cache(maxsize=4)
def names_of_others(base: str) -> frozenset[str]:
    """Last parts of the paths of all modules that are no linear layers, such as the 0 of model.layers.0."""
    others = (name for name, module in skeleton(base).named_modules() if not isinstance(module, nn.Linear))
    return frozenset(name.rpartition(".")[2] for name in others)


def _require_whole(base: str) -> None:
    """See to it that a base's weights are numbers of 16 or 32 bits: adapters are merged with these and trained on them.

    Raises:
        InputError: they are quantised.
    """
    config = _from_pretrained(AutoConfig, base)
    asked = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if not asked:
        return
    method = asked.get("quant_method") if isinstance(asked, dict) else getattr(asked, "quant_method", None)
    name = name_of(base)
    plain = QUANTISED_NAME.sub("", name)
    other = f", such as {plain}" if plain != name else ""
    raise InputError(
        f"{base}: its weights are quantised ({method or 'by its quantization_config'}); give the base in 16 bits{other}"
    )


def count_parameters(base: str) -> int:
    """How many weights the base model has, from its config alone."""
    return sum(weights.numel() for weights in skeleton(base).parameters())


def vocabulary(base: str) -> int:
    """How many logits the base model gives for each token, by its config."""
    return int(_from_pretrained(AutoConfig, base).get_text_config().vocab_size)


def class_name(base: str) -> str:
    """What the base model's config calls its class; where it does not say, the type of model."""
    config = _from_pretrained(AutoConfig, base)
    return str(next(iter(config.architectures or ()), config.model_type))


def model_type(base: str) -> str:
    """What the base model's config calls its type, such as llama."""
    return str(_from_pretrained(AutoConfig, base).model_type)


def language_part(base: str) -> str | None:
    """Where the base model's config has that of its language model, as in `text_config`. None: it is that itself."""
    config = _from_pretrained(AutoConfig, base)
    text = config.get_text_config()
    return next((key for key, value in vars(config).items() if value is text), None)


def context_length(base: str) -> int:
    """Tokens that the base model can read at once, by its config.

    Raises:
        InputError: the base model is not known.
    """
    config = _from_pretrained(AutoConfig, base).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        InputError: the base model is not known, or its tokenizer gives no character offsets.
    """
    tokenizer = _cached_tokenizer(base)
    if not tokenizer.is_fast:
        raise InputError(f"{base}: its tokenizer has no fast version, which is needed to find the completion's tokens")
    return tokenizer


def load_model(
    base: str,
    dtype: torch.dtype,
    on: torch.device | None = None,
    shared_out: bool = False,
    bits: BitsAndBytesConfig | None = None,
) -> Any:
    """The base model with weights in `dtype` on a device, by default this process', in evaluation mode. Weights are read straight
    to where they belong: a node may have less memory than its GPUs.

    Args:
        shared_out: in place of one device, its layers over all the GPUs of this process.
        bits: how its linear layers are quantised as they are read; None: not at all.
    """
    device_map = "auto" if shared_out else {"": on or device()}
    settings: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "device_map": device_map}
    settings |= {"quantization_config": bits} if bits else {}
    path, revision = source(base, weights=True)
    model = from_hub(lambda: AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype, **settings))
    model.name_or_path = model.config._name_or_path = name_of(base)  # what others call it goes into adapters' configs
    forget_lengths(model)
    return model.eval()


def source(base: str, weights: bool) -> tuple[str, str | None]:
    """What transformers and vLLM load a base by: a local folder or a Hub id, and the revision.

    Args:
        weights: whether they are to be there; a base of an object store is fetched to this node, once for all processes.
    """
    if is_stored(base):
        return str(_fetched(base, weights)), None
    return split(base)


def weights_folder(base: str) -> Path:
    """The local folder with the base model's weights: itself, or its snapshot in the Hub's cache.

    Raises:
        InputError: the Hub cannot be reached and its cache has no snapshot.
    """
    path, revision = source(base, weights=True)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(from_hub(lambda: snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"])))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(f"{base}: its weights are not in the Hub's cache and cannot be fetched ({first_line(error)})") from error


@lru_cache(maxsize=2)
def stored_weights(base: str, name: str) -> torch.Tensor | None:
    """The base's tensor of this name, or of the same one by another path to the language model, as its files have it. None: the
    base stores no such tensor, or several."""
    found = _stored(base).get(own_name(name), [])
    if len(found) != 1:
        return None
    file, stored = found[0]
    with safe_open(file, framework="pt") as tensors:
        weights: torch.Tensor = tensors.get_tensor(stored)
    return weights


def stored_embedding(base: str) -> torch.Tensor | None:
    """What turns tokens into features, as the base's files have it. None: they have no such layer, or several."""
    names = [name for name in _stored(base) if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDING_NAMES]
    return stored_weights(base, names[0]) if len(names) == 1 else None


def weight_name(base: str, tensor: str) -> str | None:
    """What the base model itself calls a weight that files have by another path to the language model. None: it has no such
    weight, or several."""
    names = _weight_names(base).get(own_name(tensor), [])
    return names[0] if len(names) == 1 else None


@lru_cache(maxsize=4)
def tied_weights(base: str) -> tuple[str, str] | None:
    """The names of the embedding's and of the output head's weights where they are one and the same."""
    model = skeleton(base)
    tied = model.get_input_embeddings().weight
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is tied]
    return (names[0], names[1]) if len(names) == 2 else None


@lru_cache(maxsize=4)
def _weight_names(base: str) -> dict[str, list[str]]:
    """The names of the base model's weights, by their own names."""
    found: dict[str, list[str]] = {}
    for name, _ in skeleton(base).named_parameters(remove_duplicate=False):
        found.setdefault(own_name(name), []).append(name)
    return found


@lru_cache(maxsize=1)
def _stored(base: str) -> dict[str, list[tuple[Path, str]]]:
    """The tensors of a base by their own names: in which file each is, and its name there."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for file in sorted(weights_folder(base).glob("model*.safetensors")):  # others beside them are of other programs
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                found.setdefault(own_name(name), []).append((file, name))
    return found


@lru_cache(maxsize=4)
def fingerprint(base: str) -> str:
    """What tells one base model from another on any machine; 16 hexadecimal digits.

    Of a Hub id: the commit of its config in the Hub's cache. Of an object store: its config, and of its files size and time. Of a
    local folder: its config and, of each tensor, name, type, shape and first values, so that a model of any size is told in a
    moment.

    Raises:
        InputError: the base model is not known.
    """
    base = pinned(base)
    _from_pretrained(AutoConfig, base)
    name, version = split(base)
    if is_stored(base):
        return _short((_fetched(base, weights=False) / "config.json").read_bytes() + str(version).encode())
    if not Path(base).is_dir():
        return _short(f"{name} {version}".encode())
    content = (Path(base) / "config.json").read_bytes()
    files = sorted(Path(base).glob("*.safetensors"))
    if not files:
        raise InputError(f"{base}: it has no weights; a base model is a folder with config.json, a tokenizer and *.safetensors")
    return _short(content + b"".join(map(_first_values, files)))


def _first_values(file: Path) -> bytes:
    """Name, type, shape and first values of each tensor in a file."""
    content = b""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_slice(name)
                first = tensors.get_tensor(name) if not tensor.get_shape() else tensor[:1]
                content += f"{name} {tensor.get_dtype()} {tensor.get_shape()}".encode()
                content += first.flatten()[:FIRST_VALUES].float().numpy().tobytes()
    except SafetensorError as error:
        raise InputError(f"{file}: these weights of the base model cannot be read ({error}); fetch them anew") from error
    return content


def device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def fast_dtype(wish: str) -> torch.dtype:
    """`wish` as a torch dtype; 'auto' is bfloat16 where this process' device multiplies it in hardware, else float32.

    A CPU without AMX or AVX512-BF16 emulates bfloat16: 48 against 180 GFLOP/s in float32 on two Cascade Lake cores.
    """
    if wish != "auto":
        return getattr(torch, wish)
    return torch.bfloat16 if torch.cuda.is_available() else cpu_dtype()


def cpu_dtype() -> torch.dtype:
    """What this machine's CPUs are fast at."""
    hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if hardware else torch.float32


@lru_cache(maxsize=8)
def _fetched(base: str, weights: bool) -> Path:
    """A base of an object store on this node's disk, where it stays while this process lives; the next one that fetches another
    removes it.

    Raises:
        InputError: there is none, or it is another one by now.
    """
    name, version = split(base)
    store, shared = Folder.at(name), node_folder.private(None, "bases")
    names = [file for file in store.list_files() if file.endswith((*DESCRIBING, *(WEIGHTS if weights else ())))]

    def fetch(target: Path) -> None:
        node_folder.remove_unused(shared)
        store.download(names, target)
        if (now := state_of(name)) != (version or now):
            raise InputError(f"{name}: this base model has changed since the run began; run it again")

    folder = shared / digest(name, version or state_of(name), weights)
    node_folder.obtain(folder, fetch)
    return folder


def skeleton(base: str) -> Any:
    """The base model without values for its weights."""
    config = _from_pretrained(AutoConfig, base)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # transformers builds one, which sees the tokens to be told
        raise InputError(f"{base}: a {config.model_type} reads in both directions; give a causal language model")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of whatever kind: transformers trusts configs
        raise InputError(f"{base}: not a causal language model that transformers can build ({one_line(error)})") from error


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@lru_cache(maxsize=4)
def _cached_tokenizer(base: str) -> PreTrainedTokenizerBase:
    return _from_pretrained(AutoTokenizer, base)


def _from_pretrained(kind: Any, base: str) -> Any:
    if looks_local(base) and not Path(base).is_dir():
        raise InputError(f"{base}: no such folder; 'base' is a local model folder, a Hub id such as org/name or s3://...")
    path, revision = source(base, weights=False)
    if any(Path(path).glob("pytorch_model*.bin*")) and not any(Path(path).glob("*.safetensors")):
        raise InputError(f"{base}: its weights are pickle, which is never opened; save the model as safetensors")
    if (Path(path) / CONFIG_FILE).exists():  # transformers would put it on the base, and vLLM would not
        raise InputError(f"{base}: this folder also holds an adapter ({CONFIG_FILE}); give one with the base model alone")
    try:
        return from_hub(lambda: kind.from_pretrained(path, revision=revision, trust_remote_code=False))
    except HubBusyError:
        raise
    except Exception as error:  # of whatever kind: transformers trusts these files
        raise unknown_base(base, error) from error
