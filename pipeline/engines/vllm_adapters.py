"""The adapters that a vLLM engine has in memory: read ahead of need, and let go when they will not be needed any more.

Reading is vLLM's own: of its worker's LoRA manager, whose function for it changes nothing and so can run beside the engine. What
is left to the engine is to copy an adapter into one of its slots. With tensor parallelism the workers are processes of their own,
and read when they are asked to score.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from pipeline.adapters.adapter import for_engine
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.engines.scorer import Loaded
from pipeline.engines.vllm_modules import put_in_place

MOST_KEPT = 1024
"""Adapters, however small: each has some hundred tensors."""


@dataclass
class _Held:
    """An adapter that was read, and the size of its weights in bytes."""

    request: LoRARequest
    bytes: int
    model: Any = None
    """What vLLM read, until it is put into the engine."""
    loss: float = 0.0
    """Of its last scores, in nats a token."""


class HeldAdapters:
    """Of one engine. `read_ahead` may be called from another thread than the rest."""

    def __init__(self, engine: Any, slots: int, kept_bytes: int, ahead: bool) -> None:
        """
        Args:
            engine: vLLM's LLMEngine.
            slots: adapters of a batch at most.
            kept_bytes: weights that may stay; those of a batch always do.
            ahead: whether the engine's worker is in this process.
        """
        self.loaded = Loaded()
        self.kept_bytes = kept_bytes
        self._engine, self._slots = engine, slots
        self._held: dict[Path, _Held] = {}
        self._ahead: dict[Path, _Held] = {}
        self._done = set[Path]()
        self._numbers = itertools.count(1)
        engine.collective_rpc(put_in_place)
        self._manager: Any = engine.collective_rpc(_lora_manager)[0] if ahead else None
        if self._manager is not None:
            self._ready: dict[int, Any] = {}
            read = self._manager._load_adapter
            self._manager._load_adapter = lambda request: self._ready.pop(request.lora_int_id, None) or read(request)

    def read_ahead(self, folder: Path) -> None:
        """Read an adapter that `hold` is to be called with. One that cannot be read fails there."""
        if self._manager is not None and folder not in self._held and folder not in self._ahead:
            with suppress(Exception):
                self._ahead[folder] = self._read(folder)

    def hold(self, folders: Sequence[Path]) -> dict[Path, LoRARequest]:
        """Have adapters in memory, all at once, and say what vLLM knows them by."""
        batch = set(folders)
        for folder in batch - self._held.keys():
            self._held[folder] = self._load(folder, batch)
        for folder in batch:
            self._ahead.pop(folder, None)  # it may have been read once more, for another batch
        self._done -= batch
        return {folder: self._held[folder].request for folder in batch}

    def note(self, folder: Path, loss: float) -> None:
        """Of two adapters, the one with the lower loss is the likelier to be needed again."""
        self._held[folder].loss = loss

    def let_go_first(self, folders: Collection[Path]) -> None:
        """Adapters that will not be needed any more."""
        self._done.update(folders)

    def _load(self, folder: Path, batch: set[Path]) -> _Held:
        """Put an adapter into the engine, before there are requests for it: one that vLLM refuses then leaves nothing behind."""
        if self._manager is None:
            with self._reading(folder) as unread:
                self._add(unread, batch)
            return unread
        held = self._ahead.pop(folder, None) or self._read(folder)
        self._ready[held.request.lora_int_id], held.model = held.model, None
        self._add(held, batch)
        return held

    def _add(self, held: _Held, batch: set[Path]) -> None:
        self._make_room(held.bytes, batch)
        self._engine.add_lora(held.request)

    def _read(self, folder: Path) -> _Held:
        with self._reading(folder) as held:
            held.model = self._manager._load_adapter(held.request)
        return held

    @contextmanager
    def _reading(self, folder: Path) -> Iterator[_Held]:
        """Within, vLLM can read the adapter. Not by the adapter's id: an engine serves several races, whose ids may be alike."""
        with self.loaded.reading(folder / WEIGHTS_FILE), temporary_folder() as scratch:
            plain = for_engine(folder, scratch)
            yield _Held(LoRARequest(str(folder), next(self._numbers), str(plain)), (plain / WEIGHTS_FILE).stat().st_size)

    def _make_room(self, size: int, batch: set[Path]) -> None:
        """Let adapters go until one of so many bytes fits, those first that are done with, then those with the highest loss;
        those of the batch always stay."""
        held = self._held
        others = sorted(held.keys() - batch, key=lambda folder: (folder not in self._done, -held[folder].loss))
        total = sum(one.bytes for one in held.values())
        for folder in others:
            if len(held) < self._slots or (len(held) < MOST_KEPT and total + size <= self.kept_bytes):
                return
            total -= held[folder].bytes
            self._engine.remove_lora(held.pop(folder).request.lora_int_id)
            self._done.discard(folder)


def _lora_manager(worker: Any) -> Any:
    """Runs in vLLM's worker; None: the engine is for the base alone."""
    return getattr(worker.model_runner, "lora_manager", None)
