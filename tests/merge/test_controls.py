"""Starts that a mashup should be better than."""

from pathlib import Path
from typing import Any

import pytest
import torch
from boards import BOARD, POOL
from safetensors.torch import save

from pipeline.config import CompareConfig, Config, TargetConfig
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.merge import controls
from pipeline.merge.controls import control_recipes
from pipeline.run_folder import Run
from pipeline.train.arm import Lora
from pipeline.train.starts import Shapes


def test_controls_are_the_papers_recipe_the_best_donor_and_random_ones() -> None:
    controls = control_recipes(BOARD, POOL, n_donors=3, rank=9)
    assert {recipe.rank for recipe in controls.values()} == {9}
    paper, best, drawn = (controls[init] for init in ("paper", "best_donor", "random_donors"))
    assert (paper.donors, paper.weights, paper.method) == (("a", "b"), (0.5, 0.5), "ab_mean")
    assert (best.donors, best.method) == (("a",), "exact")
    assert len(set(drawn.donors)) == 3
    assert drawn == control_recipes(BOARD, POOL, n_donors=3, rank=9)["random_donors"]


def test_a_start_that_was_half_written_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"target": TargetConfig(train="train.jsonl"), "compare": CompareConfig(inits=["base", "paper"])}
    run, lora, made = Run(Config(run=str(tmp_path), base="b", pool="p", **asked)), Lora(4, 8.0, ("q_proj",)), list[str]()
    run.folder.write_json(f"starts/paper/{CONFIG_FILE}", {"target_modules": ["q_proj"]})

    def write(run: Run, inits: list[str], *given: Any) -> dict[str, str]:
        made.extend(inits)
        run.folder.write_bytes(f"starts/paper/{WEIGHTS_FILE}", save({"a": torch.ones(1)}))
        return {}

    monkeypatch.setattr(controls, "_write_controls", write)
    for _ in range(2):
        assert controls.make_controls(run, 2, POOL, Shapes(lora, lora)) == ["paper"]
    assert made == ["paper"]
