"""Stage A, what is measured: memory and speed of a pass at 8B, the share of the time that a small model keeps the device busy,
and how fast adapters come to it and merges are cut."""

import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.checks import Check, Setting, WrongError, within
from benchmarks.gpu.models import LINEAR, SHAPES, TINY, draw_rows, make_model, mask_of, saved_base, shape_of, write_splits
from pipeline.adapters.low_rank import Factors, truncate, weighted_sum
from pipeline.config import TrainConfig
from pipeline.core.storage import Folder
from pipeline.model.completion_loss import collate, completion_nll
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.fused_lora import fuse
from pipeline.train.loop import Finetuning
from pipeline.train.profiler import STEPS

WARM, TIMED = 1, 3
"""Passes before those that are timed, and those."""
RANKS = (16, 64)
READ = 4
"""Adapters that are read."""
DONORS = 8
"""Of a merge."""
TRUNCATION = 1e-3
"""||merge on the device - merge on the CPU|| / ||merge on the CPU||, at most."""
KERNELS = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories in a trace of what keeps the device busy."""

Load = Callable[[Sequence[Path]], Iterator[dict[str, Tensor]]]
"""Adapter files -> what each of them holds, one after the other."""


def training_pass_8b(setting: Setting) -> dict[str, Any]:
    """Peak memory and tokens/s of a training pass with rank 16 on all linear layers: 2k, 4k and 8k tokens in rows of 512, a
    quarter of them learned; ours, and PEFT with transformers' own loss. What does not fit the device is said."""
    model = make_model(shape_of(setting, "8B"), torch.bfloat16, setting.device)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEAR)))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], fused=True)
    length, sizes = (16, (64, 128, 256)) if setting.tiny else (512, (2048, 4096, 8192))
    figures: dict[str, Any] = {}
    adapted.train()
    for name, loss in {"plain": _transformers_loss, "ours": _our_loss}.items():
        if name == "ours":
            fuse(adapted)
        for tokens in sizes:
            rows = draw_rows([length] * (tokens // length), length // 4, model.config.vocab_size)
            batch = collate(rows["input_ids"].to_pylist(), rows["learn_mask"].to_pylist(), torch.device(setting.device))
            figures |= {f"{name}_{tokens}_{kind}": value for kind, value in _pass(adapted, batch, loss, optimizer).items()}
    if "out_of_memory" in figures.get(f"ours_{sizes[0]}_result", ""):
        raise WrongError(f"not even {sizes[0]} tokens fit the device")
    return figures


def busy_share_135m(setting: Setting) -> dict[str, Any]:
    """Seconds a step that kernels run, by a trace of some steps, over the seconds a step without the profiler; the same rows in
    each step. On a CPU, the share that is spent within operators."""
    steps = 12 if not setting.tiny else 6
    lengths = [16 + number for number in range(8)] if setting.tiny else [32 + 24 * number for number in range(16)]
    data = write_splits(setting.scratch / "busy", draw_rows(lengths, 8, shape_of(setting, "135M").vocabulary))
    traces = Folder.at(setting.scratch / "traces")
    seconds = []
    for profile in (None, traces):
        settings = TrainConfig(steps=steps, batch_size=len(lengths), learning_rates=(1e-4,), evaluations=2)
        base, lora = saved_base(setting, "135M"), Lora(8, 16.0, LINEAR)
        finetuning = Finetuning(
            Job(Arm("base", 1e-4, 0), base, lora, settings, data, data, "busy", profile=profile), 0, 1, lambda *report: None
        )
        finetuning.run()
        middle, last = finetuning.curve[1], finetuning.curve[2]
        seconds.append((last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"]))
    busy = busy_seconds(Path(traces.path) / finetuning.job.trace, KERNELS[setting.device]) / STEPS
    if not busy:
        raise WrongError("the trace holds no kernels")
    return {"busy_share": busy / seconds[0], "step_s": seconds[0], "busy_s": busy, "tokens_s": sum(lengths) / seconds[0]}


def adapters_to_the_device(setting: Setting) -> dict[str, Any]:
    """MB/s and seconds an adapter from a file, in the page cache, to a slot on the device: one after the other, and with a thread
    that reads the next one into pinned memory meanwhile. All linear layers of 8B in bfloat16."""
    figures: dict[str, Any] = {}
    ways: dict[str, Load] = {"serial": _in_turn, "threaded": partial(_ahead, pinned=not setting.tiny)}
    for rank in RANKS:
        files = _write_adapters(setting, rank)
        megabytes = files[0].stat().st_size / 1e6
        for name, load in ways.items():
            slot = {name: torch.zeros_like(tensor, device=setting.device) for name, tensor in load_file(files[0]).items()}
            _fill(slot, load, files)  # torch keeps pinned memory that it once has
            seconds = _timed(partial(_fill, slot, load, files)) / len(files)
            _require_equal(slot, load_file(files[-1]))
            figures |= {f"rank{rank}_{name}_mb_s": megabytes / seconds, f"rank{rank}_{name}_s": seconds}
        for file in files:
            file.unlink()
    return figures


def truncation(setting: Setting) -> dict[str, Any]:
    """Seconds to cut the mean of eight donors of rank 16 to rank 32 in the smallest and the largest linear layer of 8B, and how
    far the result on the device is from that on the CPU."""
    shape = shape_of(setting, "8B")
    figures: dict[str, Any] = {}
    for name, outputs in {"k_proj": shape.hidden * shape.kv_heads // shape.heads, "up_proj": shape.intermediate}.items():
        merged = _mean_of_donors(outputs, shape.hidden)
        there = Factors(merged.a_RI.to(setting.device), merged.b_OR.to(setting.device))
        cut, kept = truncate(merged, 32)
        moved, kept_there = truncate(there, 32)  # warms up, too
        back = Factors(moved.a_RI.cpu(), moved.b_OR.cpu())
        figures |= {
            f"{name}_cpu_s": _timed(partial(truncate, merged, 32)),
            f"{name}_device_s": _timed(partial(truncate, there, 32)),
            f"{name}_difference": _difference(back, cut),
            f"{name}_kept_difference": abs(kept - kept_there),
        }
    return within(figures, {name: TRUNCATION for name in figures if name.endswith("difference")})


def busy_seconds(trace: Path, categories: Sequence[str]) -> float:
    """Seconds of a trace in which an event of these categories runs; those that run at once count once."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in categories)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def _transformers_loss(adapted: Any, batch: Any) -> Tensor:
    loss: Tensor = adapted(input_ids=batch.ids_BT, labels=batch.ids_BT.masked_fill(~mask_of(batch), -100)).loss
    return loss


def _our_loss(adapted: Any, batch: Any) -> Tensor:
    return completion_nll(adapted.get_base_model(), batch).mean()


def _pass(adapted: Any, batch: Any, loss: Callable[[Any, Any], Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Peak memory and speed of steps of one pass each."""
    cuda = batch.ids_BT.is_cuda

    def steps(count: int) -> None:
        for _ in range(count):
            loss(adapted, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps(WARM)
        seconds = _timed(partial(steps, TIMED)) / TIMED
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        return {"result": "out_of_memory"}
    figures = {"tokens_s": batch.ids_BT.numel() / seconds}
    if cuda:
        figures |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    return figures


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of a piece of work, the device's share in them."""
    _wait_for_device()
    started = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - started


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write_adapters(setting: Setting, rank: int) -> list[Path]:
    shape = TINY if setting.tiny else SHAPES["8B"]
    narrow = shape.hidden * shape.kv_heads // shape.heads
    sizes = {"k_proj": (narrow, shape.hidden), "v_proj": (narrow, shape.hidden), "down_proj": (shape.hidden, shape.intermediate)}
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), (shape.intermediate, shape.hidden))
    tensors = {}
    for layer in range(shape.layers):
        for name in LINEAR:
            outputs, inputs = sizes.get(name, (shape.hidden, shape.hidden))
            tensors[f"{layer}.{name}.A"] = torch.full((rank, inputs), 0.5, dtype=torch.bfloat16)
            tensors[f"{layer}.{name}.B"] = torch.full((outputs, rank), 0.25, dtype=torch.bfloat16)
    files = []
    for number in range(READ):
        tensors["0.q_proj.A"][0, 0] = number  # tells one adapter from another
        files.append(setting.scratch / f"adapter-{rank}-{number}.safetensors")
        save_file(tensors, files[-1])
    return files


def _in_turn(files: Sequence[Path]) -> Iterator[dict[str, Tensor]]:
    return map(load_file, files)


def _ahead(files: Sequence[Path], pinned: bool) -> Iterator[dict[str, Tensor]]:
    """What each file holds, read by a thread while the one before is worked on."""

    def read(file: Path) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() if pinned else tensor for name, tensor in load_file(file).items()}

    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(read, files[0])
        for file in files[1:]:
            ready, coming = coming.result(), reader.submit(read, file)
            yield ready
        yield coming.result()


def _fill(slot: dict[str, Tensor], load: Load, files: Sequence[Path]) -> None:
    for tensors in load(files):
        for name, tensor in tensors.items():
            slot[name].copy_(tensor, non_blocking=True)
        _wait_for_device()


def _require_equal(slot: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if not torch.equal(slot[name].cpu(), tensor)]
    if wrong:
        raise WrongError(f"{len(wrong)} tensors did not arrive, {wrong[0]} the first")


def _mean_of_donors(outputs: int, inputs: int) -> Factors:
    generator = torch.Generator().manual_seed(0)
    parts = [
        Factors(torch.randn(16, inputs, generator=generator), torch.randn(outputs, 16, generator=generator))
        for _ in range(DONORS)
    ]
    return weighted_sum(parts, [1 / DONORS] * DONORS)


def _difference(found: Factors, expected: Factors) -> float:
    """||found - expected|| / ||expected|| of two delta weights."""
    one, other = (Factors(delta.a_RI.double(), delta.b_OR.double()) for delta in (found, expected))
    return weighted_sum([one, other], [1.0, -1.0]).norm() / other.norm()


CHECKS: tuple[Check, ...] = (training_pass_8b, busy_share_135m, adapters_to_the_device, truncation)
