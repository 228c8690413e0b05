"""Recipes built into folders, read back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.adapters import adapter
from pipeline.adapters.adapter import Indexed, hash_of, read_adapter
from pipeline.core.errors import AdapterError
from pipeline.core.storage import Folder
from pipeline.merge.build import build
from pipeline.merge.recipes import Recipe


def test_recipes_become_folders_and_refusals_reasons(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> None:
    folders = {name: make_adapter(tmp_path / name, tiny_base, rank=rank, seed=rank) for name, rank in (("a", 2), ("b", 3))}
    both = ("a", "b"), (0.5, 0.5)
    recipes = {"mean": Recipe(*both, "exact", 5), "apart": Recipe(*both, "ab_mean", 3)}
    indexed = {name: Indexed(str(folder), hash_of(folder)) for name, folder in folders.items()}
    built, refused = build(recipes, indexed, tiny_base, Folder.at(tmp_path / "built"), alpha=7)
    assert refused == {"apart": "ab_mean needs donors of one rank, alpha and set of target modules; use method: exact"}
    assert list(built) == ["mean"]
    assert built["mean"].kept == pytest.approx(1)
    folder = tmp_path / "built/mean"
    merged = read_adapter(folder)
    assert built["mean"].hash == hash_of(folder)
    assert (merged.max_rank, merged.config.lora_alpha) == (5, 7)
    donors = [read_adapter(folder) for folder in folders.values()]
    for module in merged.modules:
        expected = sum((donor.factors(module).dense() for donor in donors), torch.zeros(())) / 2
        torch.testing.assert_close(merged.factors(module).dense(), expected, rtol=1e-3, atol=1e-5)
    assert not (tmp_path / "built/apart").exists()


def test_a_donor_that_changed_since_it_was_indexed_is_not_merged(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_base, rank=2)
    indexed = {"a": Indexed(str(folder), hash_of(folder))}
    make_adapter(folder, tiny_base, rank=2, seed=9)
    with pytest.raises(AdapterError, match=f"{folder}: it changed since the pool was indexed"):
        build({"mean": Recipe(("a",), (1.0,), "exact", 2)}, indexed, tiny_base, Folder.at(tmp_path / "built"))
    assert not (tmp_path / "built").exists()


def test_nor_is_one_that_changes_while_it_is_read(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = make_adapter(tmp_path / "a", tiny_base, rank=2), adapter.read_adapter
    known = Indexed(str(folder), hash_of(folder))

    def read_and_change(folder: Path, base: str) -> adapter.Adapter:
        found = read(folder, base=base)
        make_adapter(folder, tiny_base, rank=2, seed=9)
        return found

    monkeypatch.setattr(adapter, "read_adapter", read_and_change)
    with pytest.raises(AdapterError, match="it changed since"):
        adapter.read_indexed(known, tmp_path, tiny_base)
