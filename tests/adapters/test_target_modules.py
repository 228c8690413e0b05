"""Which modules a config means: as PEFT would have it, and never for long."""

import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from pipeline.adapters.target_modules import MATCH_SECONDS, own_scales, targets, text_layers
from pipeline.core.errors import AdapterError
from pipeline.model.base_model import Shapes

ENDLESS = "(?:(.)|(.)|(.)|(.))*(?<=Z)$"
"""A regular expression that tries 4^n ways on a name of n letters."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 16)


class Net(nn.Module):
    """Three layers with names such as a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})


SHAPES: Shapes = {name: tuple(module.weight.shape) for name, module in Net().named_modules() if isinstance(module, nn.Linear)}
"""Of `Net`."""


def adapted(config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Module -> rank and alpha, of the layers that PEFT adapts."""
    with torch.device("meta"):
        model = get_peft_model(Net(), config)
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"] * module.r["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def meant(config: LoraConfig, shapes: Shapes) -> dict[str, tuple[int, float]]:
    """The same by our reading."""
    own = own_scales(config, shapes)
    return {name: own.get(name, (config.r, float(config.lora_alpha))) for name in targets(config, shapes, head=None)}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.q_proj", "up_proj"]},
        {"target_modules": r".*layers\.[02]\..*_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.k_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r".*k_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"[qk]_proj": 2, "q_proj": 1}},
    ],
)
def test_modules_ranks_and_alphas_are_those_of_peft(fields: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=8, **fields)
    assert meant(config, SHAPES) == adapted(config)


def test_all_linear_leaves_out_the_head() -> None:
    config = LoraConfig(target_modules="all-linear")
    assert targets(config, {**SHAPES, "lm_head": (10, 8)}, head="lm_head") == set(SHAPES)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"target_modules": ["q_proj"], "exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"rank_pattern": {f"{ENDLESS}{n}": 4 for n in range(100)}},
        {"rank_pattern": {f"(.*a){{5}}{n}": 4 for n in range(50_000)}},
    ],
)
def test_a_pattern_that_matches_for_ever_is_stopped_in_time(fields: dict[str, Any]) -> None:
    config = LoraConfig(**fields)
    shapes = {f"model.layers.{'0' * 40}.q_proj": (8, 8)}
    started = time.monotonic()
    with pytest.raises(AdapterError, match="takes more than 1 s to match"):
        meant(config, shapes)
    assert time.monotonic() - started < 10 * MATCH_SECONDS


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_modules": "q" * 3000}, "3000 characters"),
        ({"target_modules": "(a{10000}){10000}"}, "repeats too much"),
        ({"target_modules": "(?x)(a{#\n9999}){ 9999 }"}, "sets a flag"),
        ({"target_modules": "(?i:q_proj)"}, "sets a flag"),
        ({"alpha_pattern": {"self_attn)|(zzz": 9}}, "no regular expression"),
        ({"target_modules": "[^v[:digit:]]*"}, "means other things to other readers"),
        ({"alpha_pattern": {"((a{99}){99}){99}": 1}}, "repeats too much"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": "(?:(?:a{3000}){3000})b{0}"}, "repeats too much"),
        ({"alpha_pattern": {"(?:q_prxx){e<=3}": 9}}, "means other things to other readers"),
        ({"target_modules": "[[:alpha:]_]+"}, "means other things to other readers"),
    ],
)
def test_a_pattern_that_is_none_or_too_large_is_refused(fields: dict[str, Any], reason: str) -> None:
    config = LoraConfig(**fields)
    with pytest.raises(AdapterError, match=reason):
        meant(config, SHAPES)


def test_a_large_config_that_names_every_module_by_its_path_is_read_in_time() -> None:
    """As initialisations that give each module a rank of its own write it, of a model of 80 layers."""
    names = [
        f"model.layers.{layer}.{leaf}" for layer in range(80) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "a", "b", "c")
    ]
    config = LoraConfig(
        rank_pattern={name: 1 + place % 7 for place, name in enumerate(names)}, alpha_pattern=dict.fromkeys(names, 3)
    )
    assert own_scales(config, names) == {name: (1 + place % 7, 3.0) for place, name in enumerate(names)}


def test_layers_of_text_by_their_ends() -> None:
    shapes: Shapes = dict.fromkeys(("model.layers.0.proj", "model.vision.0.proj", "model.lists.1", "proj"), (8, 8))
    assert text_layers(["proj", "lists.1"], shapes) == ["model.layers.0.proj", "model.lists.1", "proj"]
