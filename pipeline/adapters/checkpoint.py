"""A full finetune of the base as a donor: what it changed in the linear layers, as a low-rank adapter.

One tensor at a time is read, from whichever shard has it; what stays in memory are the factors. Tensors are compared by their own
names (`layer_names.own_name`): whatever a model was wrapped in, or is a part of, is no change.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.adapters.adapter import Adapter, from_factors
from pipeline.adapters.low_rank import Factors, factorise
from pipeline.adapters.validation import check_dtype, open_weights
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import CONFIG_FILE, INDEX_FILE
from pipeline.core.storage import MAX_HEADER_BYTES
from pipeline.model.base_model import Shapes, weights_folder
from pipeline.model.layer_names import EMBEDDING_NAMES, HEADS, is_of_text, own_name

ENERGY = 0.9
"""The adapter gets the smallest rank that keeps this share of the squared norm of the linear layers' change, MAX_RANK at most."""

MAX_RANK = 64

MAX_ENERGY = 1e30
"""Of a tensor's change, its squared norm: far beyond any honest one, and within float32."""

TIED = "lm_head.weight"
"""Tied to the embeddings in one of base and finetune, and written out in the other."""

COMPUTED = (".inv_freq", ".masked_bias")
"""Ends of names of what older versions of transformers saved though it is computed."""


@dataclass(frozen=True)
class Factored:
    """`kept`: share of the squared norm of the linear layers' change that the adapter has. `elsewhere`: share of the whole
    change's squared norm that is in embeddings, norms or the head, which an adapter does not have."""

    adapter: Adapter
    kept: float
    elsewhere: float

    def describe(self) -> str:
        return (
            f"full checkpoint, factored at rank {self.adapter.max_rank}: {self.kept:.1%} of its change of the linear layers is "
            f"kept; {self.elsewhere:.1%} of its whole change is elsewhere, and lost"
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a whole model rather than an adapter."""
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return whole and not (folder / CONFIG_FILE).exists()


def factor_checkpoint(folder: Path, base: str, shapes: Shapes, head: str | None) -> Factored:
    """Factor what a finetune changed in the base, by a randomised SVD of each linear layer's difference.

    Raises:
        AdapterError: it is not a finetune of this base, its files are corrupt, or it changed no linear layer.
    """
    modules = {f"{own_name(module)}.weight": module for module in shapes if module != head and is_of_text(module)}
    deltas: dict[str, Factors] = {}
    linear, elsewhere = 0.0, 0.0
    for name, delta in _differences(folder, base, modules):
        energy = float((delta.double() ** 2).sum())
        if not energy < MAX_ENERGY:
            raise AdapterError(f"weights too large: the change of {name} has a squared norm of {energy:.3g}")
        if name not in modules:
            elsewhere += energy
        elif energy:
            linear += energy
            deltas[modules[name]], _ = factorise(delta, MAX_RANK)
    if not deltas:
        raise AdapterError("a full checkpoint that changed no linear layer of the base")
    rank, kept = _rank_that_keeps(deltas, linear)
    cut = {module: Factors(delta.a_RI[:rank], delta.b_OR[:, :rank]) for module, delta in deltas.items()}
    return Factored(from_factors(base, cut, rank, rank, shapes, seed=0), kept, elsewhere / (linear + elsewhere))


class _Stored(NamedTuple):
    """A tensor, and the file that has it."""

    file: safe_open
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return str(self.file.get_slice(self.name).get_dtype())

    def read(self) -> Tensor:
        weights: Tensor = self.file.get_tensor(self.name)
        return weights


def _differences(folder: Path, base: str, linear: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and change in float32 of each tensor; the base is rounded as the finetune is stored, or that would be a change. Rows
    of a vocabulary that one of the two alone has are passed over."""
    tuned, original = _open(folder), _open(weights_folder(base))
    _check_sizes(tuned, original, linear)
    for name in sorted(tuned.keys() & original.keys()):
        new, old = tuned[name].read(), original[name].read()
        if not torch.isfinite(new).all():
            raise AdapterError(f"NaN or Inf in {name}")
        if new.shape != old.shape:
            new, old = (tensor[: min(len(new), len(old))] for tensor in (new, old))
        yield name, new.float() - old.to(new.dtype).float()


def _check_sizes(tuned: dict[str, _Stored], original: dict[str, _Stored], linear: Collection[str]) -> None:
    """Compare what the files declare, before memory is taken for a tensor. `linear`: names of the weights of linear layers, which
    must all be there."""
    for name, tensor in sorted(tuned.items()):
        if name not in original:
            if name == TIED or name.endswith(COMPUTED) or not is_of_text(name):
                continue
            raise AdapterError(f"wrong base: the checkpoint has a tensor {tensor.name} that the base has not")
        check_dtype(tensor.name, tensor.dtype)
        found, wanted = tensor.shape, original[name].shape
        if found != wanted and not (_is_of_vocabulary(name) and found[1:] == wanted[1:]):
            raise AdapterError(f"wrong base: {tensor.name} is {found}, the base has {wanted}")
    if absent := sorted((original.keys() & linear) - tuned.keys()):
        raise AdapterError(f"missing weights: the checkpoint has no tensor {original[absent[0]].name}, which the base has")


def _is_of_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return name.removesuffix(".weight").rpartition(".")[2] in (*EMBEDDING_NAMES, *HEADS)


def _open(folder: Path) -> dict[str, _Stored]:
    """The tensors by their own names, of the files that transformers reads."""
    found: dict[str, _Stored] = {}
    for file in map(open_weights, _files(folder)):
        for name in file.keys():  # noqa: SIM118 (not a dict)
            other = found.setdefault(own_name(name), _Stored(file, name))
            if other.name != name:
                raise AdapterError(f"corrupt weights: {name} is there twice, as {other.name}, too")
    return found


def _files(folder: Path) -> list[Path]:
    """The one file of a checkpoint, or else the shards that its index names; others beside them are of other programs."""
    whole, index = folder / "model.safetensors", folder / INDEX_FILE
    if whole.exists() or not index.exists():
        return [whole]
    if (size := index.stat().st_size) > MAX_HEADER_BYTES:
        raise AdapterError(f"corrupt weights: {INDEX_FILE} has {size} bytes; {MAX_HEADER_BYTES} are allowed")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"corrupt weights: {INDEX_FILE} names no files ({error})") from error
    if outside:
        raise AdapterError(f"corrupt weights: {INDEX_FILE} names {outside[0]!r}, which is no file of the checkpoint")
    return [folder / name for name in names]


def _rank_that_keeps(deltas: dict[str, Factors], linear: float) -> tuple[int, float]:
    """The smallest rank that keeps ENERGY of `linear`, and what it keeps."""
    energy_R = torch.zeros(MAX_RANK)
    for delta in deltas.values():
        squares = (delta.a_RI.norm(dim=1) * delta.b_OR.norm(dim=0)) ** 2  # balanced factors: the singular values
        energy_R[: len(squares)] += squares
    kept_R = energy_R.cumsum(0) / linear
    enough = (kept_R >= ENERGY).nonzero()
    rank = int(enough[0]) + 1 if len(enough) else int(energy_R.count_nonzero())
    return rank, float(kept_R[rank - 1])
