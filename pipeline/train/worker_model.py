"""What an arm trains: an adapter on a frozen base, or all weights; made from its start, spread over the workers, saved and
restored.

A checkpoint holds whole weights and moments, so that it is the same whatever the number of workers and whether they share the
weights out (FSDP2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from pipeline.adapters.adapter import (
    Adapter,
    alpha_at,
    from_factors,
    put_on,
    read_adapter,
    text_targets,
    with_whole,
    write_adapter,
)
from pipeline.adapters.fetch import fetch_adapter
from pipeline.adapters.low_rank import Factors, truncate, weighted_sum
from pipeline.adapters.peft_names import fresh_on
from pipeline.adapters.saved_layers import trained_layers
from pipeline.adapters.validation import read_declared
from pipeline.core.base_ref import name_of
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.model.base_model import device, fast_dtype, linear_shapes, load_model, load_tokenizer
from pipeline.model.completion_loss import Batch, completion_nll, decoder_of, score_tokens
from pipeline.train.arm import Job, download_model
from pipeline.train.evaluate import causal
from pipeline.train.fused_lora import fuse
from pipeline.train.quantised_base import load_quantised

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""Of a state dict that is the same whatever the number of workers."""

BUCKET = 1 << 26
"""Gradients that workers sum at a time: 256 MB in float32."""


class Completions(nn.Module):
    """A causal LM as one module for FSDP to wrap: in training its forward is the summed NLL of the learned tokens, else
    what `score_tokens` gives.

    What rows begin with is not computed apart where weights are shared out: to run the decoder once more than the other workers
    would leave them waiting, and whether it pays depends on each worker's own rows.
    """

    def __init__(self, model: nn.Module, shared_out: bool) -> None:
        super().__init__()
        self.model, self.shared_out = model, shared_out

    def forward(self, batch: Batch) -> Any:
        model = causal(self.model)
        if self.shared_out:
            batch = replace(batch, n_shared=0)
        return completion_nll(model, batch).sum() if self.training else score_tokens(model, batch)


class Trainable:
    """A worker's model with what is trained of it."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers = job, workers
        products = fast_dtype(job.train.dtype)
        mixed = (job.full or job.quantised) and products != torch.float32
        torch.manual_seed(job.arm.seed)
        with _start(job) as start, _sharing_out(workers) if job.train.shard else nullcontext() as mesh:
            apart = start and (job.moved or (job.folded and not job.full))
            self.start = read_adapter(start) if start and apart else None
            self.whole = trained_layers(start, read_declared(start), job.base) if start and not job.full else {}
            self.model = _build(job, start)
            decoder_of(causal(self.model))  # found out now, while this worker has all weights
            if not job.quantised:  # those of a base in 4 bits have its own product; its head computes under autocast
                fuse(self.model)
            if job.train.gradient_checkpointing:
                causal(self.model).gradient_checkpointing_enable({"use_reentrant": False})
            self.completions = Completions(self.model, job.train.shard)
            if mesh:
                _shard(self.completions, mesh, products if mixed else None)
        learning = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.weights = list(learning.values())
        self._kept = set(learning) | ({name for name, _ in self.model.named_buffers()} if job.full else set())
        # Weights that are shared out are gathered in the type of the products, and need no cast in each pass.
        self._precision = torch.autocast(device().type, products, enabled=mixed and not job.train.shard)
        self._replicated = workers > 1 and not job.train.shard
        if self._replicated:  # GPUs of two kinds may draw other first weights from one seed
            for weight in self.weights:
                distributed.broadcast(weight.data, 0)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The weights that are trained, for an optimizer: B has `train.lora_plus` times the learning rate (LoRA+)."""
        times = self.job.train.lora_plus
        if times == 1:
            return [{"params": self.weights}]
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        of_b = [weight for name, weight in named if ".lora_B." in name]
        others = [weight for name, weight in named if ".lora_B." not in name]
        return [{"params": others}, {"params": of_b, "lr": times * lr}]

    def loss(self, batch: Batch) -> Tensor:
        """Summed NLL of the learned tokens. Its gradients stay this worker's own, unless workers share the weights out."""
        self.completions.train()
        with self._precision:
            return self.completions(batch)

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `score_tokens`."""
        self.completions.eval()
        with self._precision:
            return self.completions(batch)

    def average_gradients(self) -> None:
        """Give all workers the mean of their gradients, as FSDP has done for those that share the weights out. All must call it.

        Not while the last pass still computes, as DDP does: a worker that ran out of memory in it would leave the others waiting.
        """
        if not self._replicated:
            return
        for weight in self.weights:
            if weight.grad is None:  # no row of this worker reached it, such as an expert of a mixture
                weight.grad = torch.zeros_like(weight)
        for bucket in _buckets([weight.grad for weight in self.weights]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            parts = flat.div_(self.workers).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def moment_bytes(self) -> int:
        """Of Adam's two moments of all that this worker trains."""
        own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.weights)
        return sum(2 * weight.numel() * weight.element_size() for weight in own)

    def trained(self, rank: int) -> dict[str, Any]:
        """A copy of the weights that are trained, on the first worker. All of them must call it."""
        live = {name: weight for name, weight in self.model.state_dict().items() if name in self._kept}
        copied: dict[str, Any] = _copied(live, keep=rank == 0)
        return copied

    def moments(self, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
        """A copy of this worker's share of an optimizer's state, by the names of the weights. Of an adapter the first worker has
        all of it. All of them must call it."""
        # Before its first step an optimizer has none, and to be asked for it would count as a step.
        found: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer) if optimizer.state else {"state": {}}
        writers = self.workers if self.job.full else 1
        mine = {}
        for number, (name, moments) in enumerate(found["state"].items()):
            keep = number % writers == rank
            copied = _copied(moments, keep)
            if keep:
                mine[name] = copied
        return {**found, "state": mine}

    def restore(self, state: dict[str, Any], optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Go on from weights that `trained` gave and the moments of all workers; where all weights are trained, from those that
        `save` wrote to `folder`."""
        weights = load_model(str(folder), torch.float32, torch.device("cpu")).state_dict() if self.job.full else state["weights"]
        set_model_state_dict(self.model, weights, options=WHOLE)
        if state["optimizer"]["state"]:
            set_optimizer_state_dict(self.model, optimizer, state["optimizer"], options=WHOLE)

    def save(self, folder: Path, trained: dict[str, Any]) -> None:
        """Write the adapter, or the model, as others read it."""
        if self.start or self.whole:
            with temporary_folder() as scratch:
                self.model.save_pretrained(scratch, state_dict=trained, save_embedding_layers=False)
                adapter = read_adapter(scratch)
            if self.start:
                adapter = _on_top(self.job.base, self.start, adapter, -1.0 if self.job.moved else 1.0)
            write_adapter(folder, with_whole(adapter, self.whole, self.job.base), base=self.job.base)
            return
        # Else PEFT asks the Hub, at each checkpoint, whether the base's vocabulary has grown.
        settings = {} if self.job.full else {"save_embedding_layers": False}
        self.model.save_pretrained(str(folder), state_dict=trained, **settings)
        if self.job.full:
            load_tokenizer(self.job.base).save_pretrained(str(folder))


def trained(job: Job, checkpoint: Folder, workers: int) -> Trainable:
    """What an arm left at `checkpoint`, spread over the workers as it was in training; `job` is that of any arm."""
    if not job.full:
        return Trainable(replace(job, arm=replace(job.arm, init="trained"), start=checkpoint, folded=False, moved=False), workers)
    with temporary_folder() as local:
        download_model(checkpoint, local)
        return Trainable(replace(job, arm=replace(job.arm, init="base"), base=str(local)), workers)


@contextmanager
def _sharing_out(workers: int) -> Iterator[DeviceMesh]:
    """The mesh of all workers, one of a node after the other: its memory need hold no more than one whole base."""
    mesh = init_device_mesh(device().type, (workers,))
    before = distributed.get_node_local_rank()
    for _ in range(before):
        distributed.barrier()
    yield mesh
    for _ in range(workers - before):
        distributed.barrier()


def _shard(completions: Completions, mesh: DeviceMesh, products: torch.dtype | None) -> None:
    """Share the weights out among the workers, a decoder layer at a time (FSDP2).

    Args:
        products: the type that weights are gathered and computed in, their gradients summed in float32; None: their own.
    """
    model = causal(completions.model)
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32) if products else MixedPrecisionPolicy()
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(completions, mesh=mesh, mp_policy=policy)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of at most BUCKET values, or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


@contextmanager
def _start(job: Job) -> Iterator[Path | None]:
    """The local folder of the adapter to start from; None: from the base."""
    with temporary_folder() as cache:
        yield None if job.arm.init == "base" else fetch_adapter(job.start.uri, cache)


def _build(job: Job, start: Path | None) -> Any:
    """The model with what is trained of it, from the base or from the adapter at `start`."""
    model = _start_model(job, start if job.folded else None)
    if start and job.moved:
        model = _without(model, start, job.base)
    if start and not job.folded:
        return put_on(model, start, job.base, is_trainable=True)
    if job.full:
        return model.requires_grad_(True)
    fresh = LoraConfig(
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        target_modules=text_targets(job.lora.target_modules, job.base),
        base_model_name_or_path=name_of(job.base),
        task_type="CAUSAL_LM",
    )
    return fresh_on(model, fresh)


def _without(model: Any, adapter: Path, base: str) -> Any:
    """The model with the delta weights of an adapter taken from its own."""
    with_it = put_on(model, adapter, base)
    for module in with_it.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: -scale for name, scale in module.scaling.items()}
    return with_it.merge_and_unload()


def _start_model(job: Job, folded: Path | None) -> Any:
    """The base, with the adapter at `folded` added to its weights."""
    dtype = torch.float32 if job.full else fast_dtype(job.train.dtype)
    if job.quantised:
        return load_quantised(job.base, dtype, folded)
    on = torch.device("cpu") if job.train.shard else device()  # a base that is shared out need not fit one device
    model = load_model(job.base, dtype, on)
    return put_on(model, folded, job.base).merge_and_unload() if folded else model


def _copied(tree: Any, keep: bool) -> Any:
    """The tensors copied to the host's memory, each of them whole; None in their places where they are not to be kept. All
    workers must call it."""

    def copied(tensor: Tensor) -> Tensor | None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().to("cpu", copy=True) if keep else None

    return tree_map_only(Tensor, copied, tree)


def _on_top(base: str, start: Adapter, fresh: Adapter, times: float = 1.0) -> Adapter:
    """The exact sum of the two as one adapter, the start taken so many times."""
    rank = start.max_rank + fresh.max_rank
    alpha = alpha_at(rank, start.max_rank, abs(start.scale(start.modules[0])) or 1.0)
    sums: dict[str, Factors] = {}
    for module in sorted({*start.tensors, *fresh.tensors}):
        parts = [(one.factors(module), weight) for one, weight in ((start, times), (fresh, 1.0)) if module in one.tensors]
        sums[module], _ = truncate(weighted_sum(*map(list, zip(*parts, strict=True))), rank)
    return from_factors(base, sums, rank, alpha, linear_shapes(base)[0], seed=0)
