"""What a pool declares before it is checked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.adapters import first_look as module
from pipeline.adapters.first_look import first_look
from pipeline.adapters.pool import Listed, look_at
from pipeline.core.file_names import CONFIG_FILE


def test_it_gives_ranks_and_modules_of_those_that_may_be_donors(
    tmp_path: Path, tiny_base: str, untied_base: str, make_adapter: Callable[..., Path]
) -> None:
    pool = tmp_path / "pool"
    make_adapter(pool / "plain", tiny_base, rank=3)
    make_adapter(pool / "patterned", tiny_base, rank=2, targets=["o_proj"], rank_pattern={"layers.1.self_attn.o_proj": 7})
    make_adapter(pool / "unread", tiny_base, rank=99)
    (pool / "unread" / CONFIG_FILE).write_text("{")
    make_adapter(pool / "left-out", tiny_base, rank=98)
    found = first_look(look_at(str(pool), ["left-*"]).found, tiny_base).to_pylist()
    assert found == [
        {"adapter_id": "patterned", "rank": 7, "target_modules": ["o_proj"]},
        {"adapter_id": "plain", "rank": 3, "target_modules": ["q_proj", "v_proj"]},
    ]


def test_a_pool_that_lies_elsewhere_or_is_large_is_left_to_the_check(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Listed("one", str(make_adapter(tmp_path / "one", tiny_base)))
    assert len(first_look([here], tiny_base)) == 1
    assert len(first_look([here, Listed("far", "s3://bucket/far")], tiny_base)) == 0
    monkeypatch.setattr(module, "MOST", 1)
    assert len(first_look([here, here], tiny_base)) == 0
