"""Which adapters an engine has in memory, with something that stands for vLLM's engine; test_vllm.py has the real one."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.adapters.validation import read_declared
from pipeline.core.file_names import WEIGHTS_FILE


class Engine:
    """Takes adapters in and lets them go; its worker's manager reads them."""

    def __init__(self) -> None:
        self.has: dict[int, Any] = {}
        self.read_in: list[tuple[str, str]] = []
        self.lora_manager = self.model_runner = self
        modules = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
        self._adapter_manager = SimpleNamespace(modules=dict.fromkeys(modules), packed_modules={})

    def collective_rpc(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self)]

    def _load_adapter(self, request: Any) -> Any:
        if "refused" in request.lora_path:
            raise ValueError("no such module")
        self.read_in.append((Path(request.lora_path).name, threading.current_thread().name))
        return SimpleNamespace(of=request.lora_path, loras=read_declared(Path(request.lora_path)).sizes)

    def add_lora(self, request: Any) -> None:
        self.has[request.lora_int_id] = self._load_adapter(request)

    def remove_lora(self, number: int) -> None:
        del self.has[number]


@pytest.fixture
def pool(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {
        name: make_adapter(tmp_path / name, tiny_base, seed=seed) for seed, name in enumerate(("a", "b", "c", "d", "refused"))
    }


def held(engine: Engine, pool: dict[str, Path], room: float, ahead: bool = True) -> Any:
    """With slots for two, and room for so many more."""
    from pipeline.engines.vllm_adapters import HeldAdapters

    size = (pool["a"] / WEIGHTS_FILE).stat().st_size
    return HeldAdapters(engine, slots=2, kept_bytes=round(room * size), ahead=ahead)


def test_what_was_read_ahead_in_another_thread_is_not_read_again(pool: dict[str, Path]) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=4)
    loader = threading.Thread(target=lambda: [adapters.read_ahead(pool[name]) for name in ("a", "refused", "a")], name="loader")
    loader.start()
    loader.join()
    assert engine.has == {}
    requests = adapters.hold([pool["a"], pool["b"]])
    assert {name for name, _ in engine.read_in} == {"a", "b"}
    assert ("a", "loader") in engine.read_in
    assert len(engine.read_in) == 2
    assert {engine.has[request.lora_int_id].of for request in requests.values()} == {str(pool["a"]), str(pool["b"])}
    assert adapters.loaded.adapters == 2
    adapters.read_ahead(pool["b"])  # it is here
    assert len(engine.read_in) == 2


def test_what_cannot_be_read_fails_where_it_is_asked_for_and_leaves_nothing(pool: dict[str, Path]) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=4)
    adapters.read_ahead(pool["refused"])
    with pytest.raises(ValueError, match="no such module"):
        adapters.hold([pool["refused"]])
    assert engine.has == {}
    assert adapters.hold([pool["a"]]).keys() == {pool["a"]}


@pytest.mark.parametrize("ahead", [True, False])
def test_an_adapter_of_which_the_engine_would_leave_a_part_out_is_refused(
    pool: dict[str, Path], tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], ahead: bool
) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=4, ahead=ahead)
    more = make_adapter(tmp_path / "more", tiny_base, targets=["q_proj", "down_proj"])
    adapters.read_ahead(more)
    with pytest.raises(ValueError, match=r"vLLM would leave out 2 of the adapter's 4 modules: .*layers\.0\.mlp\.down_proj"):
        adapters.hold([more])
    assert engine.has == {}


def test_who_is_done_with_makes_room_first_then_who_has_the_highest_loss(pool: dict[str, Path]) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=3.5)

    def here() -> set[str]:
        return {Path(one.of).name for one in engine.has.values()}

    for name, loss in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        adapters.hold([pool[name]])
        adapters.note(pool[name], loss)
    assert here() == {"a", "b", "c"}
    adapters.hold([pool["d"]])
    adapters.note(pool["d"], 9.0)
    assert here() == {"a", "c", "d"}
    adapters.let_go_first([pool["a"]])
    adapters.hold([pool["b"]])
    assert here() == {"b", "c", "d"}
    adapters.hold([pool["d"], pool["a"]])  # those of the batch stay, whatever their loss
    assert {"a", "d"} < here()


def test_a_batch_that_is_larger_than_what_may_be_kept_is_held(pool: dict[str, Path]) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=0)
    for names in (("a", "b"), ("c", "d"), ("a",)):
        adapters.hold([pool[name] for name in names])
        assert {Path(one.of).name for one in engine.has.values()} >= set(names)
        assert len(engine.has) <= 2


def test_an_engine_whose_workers_are_elsewhere_reads_when_it_is_asked_to(pool: dict[str, Path]) -> None:
    engine = Engine()
    adapters = held(engine, pool, room=4, ahead=False)
    adapters.read_ahead(pool["a"])
    assert engine.read_in == []
    adapters.hold([pool["a"]])
    assert [name for name, _ in engine.read_in] == ["a"]
    assert adapters.loaded.adapters == 1
