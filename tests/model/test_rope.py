"""Bases whose rotary embedding depends on how long a pass is: each row is judged as it is alone, whatever shares its pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import SMALL
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.model.base_model import load_model
from pipeline.model.completion_loss import collate, completion_nll, score_rows
from pipeline.model.rope import depends_on_length

CPU = torch.device("cpu")
FITS = 32
"""Tokens up to which the lengths of rows do not count."""

ALIKE = 24
"""Tokens that all rows begin with, enough of them for sharing to pay."""

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": FITS,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": FITS, "max_position_embeddings": 512}),
    "own scale": ("phimoe", {"rope_parameters": LONG | {"short_mscale": 1.0, "long_mscale": 1.5}, "num_local_experts": 2}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": FITS}),
    "by layer": (
        "gemma3_text",
        {
            "rope_parameters": SLIDING,
            "layer_types": ["full_attention", "sliding_attention"],
            "max_position_embeddings": FITS,
            "query_pre_attn_scalar": 16,
        },
    ),
}


def config_of(name: str) -> Any:
    kind, own = BASES[name]
    return AutoConfig.for_model(kind, **SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | own)


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name)).eval()


def drawn(*lengths: int) -> list[list[int]]:
    """Rows of these lengths that begin with the same ALIKE tokens."""
    generator = torch.Generator().manual_seed(0)
    begin, *rest = (torch.randint(3, 64, (n,), generator=generator).tolist() for n in (ALIKE, *(n - ALIKE for n in lengths)))
    return [begin + row for row in rest]


def alone(name: str, row: list[int]) -> float:
    """By a model that has seen no other row."""
    with torch.no_grad():
        logp = fresh(name)(input_ids=torch.tensor([row])).logits[0].float().log_softmax(dim=-1)
    return -sum(float(logp[place - 1, row[place]]) for place in range(ALIKE + 1, len(row)))


@pytest.mark.parametrize("lengths", [(40, 40, 40, 40), (48, 40, 32, 30), (32, 30, 31, 32)])
@pytest.mark.parametrize("name", BASES)
def test_a_rows_loss_is_that_which_it_has_alone(name: str, lengths: tuple[int, ...]) -> None:
    """Those that begin alike and end beyond what fits, those that share a pass with longer ones, and those that all fit."""
    rows, model = drawn(*lengths), fresh(name)
    score_rows(model, collate(drawn(60), [[True] * 60], CPU))  # of which nothing may stay
    masks = [[place > ALIKE for place in range(len(row))] for row in rows]
    found = score_rows(model, collate(rows, masks, CPU))[0]
    assert found.tolist() == pytest.approx([alone(name, row) for row in rows], rel=1e-4)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_the_gradient_is_that_of_the_rows_alone(name: str) -> None:
    rows, model = drawn(48, 32), fresh(name)

    def gradient(*chosen: list[int]) -> Tensor:
        completion_nll(
            model, collate(chosen, [[place > ALIKE for place in range(len(row))] for row in chosen], CPU)
        ).sum().backward()
        found: Tensor = model.get_decoder().layers[0].mlp.down_proj.weight.grad.clone()
        model.zero_grad()
        return found

    torch.testing.assert_close(gradient(*rows), gradient(rows[0]) + gradient(rows[1]), rtol=1e-3, atol=1e-3)


def test_a_loaded_base_forgets_the_longest_row_that_it_saw(tiny_base: str, tmp_path: Path) -> None:
    """Also where it is run as transformers runs it."""
    fresh("dynamic").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32)
    longer, shorter = (torch.tensor([row]) for row in drawn(60, 40))
    with torch.no_grad():
        model(longer)
        torch.testing.assert_close(model(shorter).logits, fresh("dynamic")(shorter).logits)


@pytest.mark.parametrize(
    ("kind", "own", "depends"),
    [
        ("llava", {"text_config": {"model_type": "llama", "rope_parameters": DYNAMIC}}, True),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}, False),
        ("gpt2", {}, False),
    ],
)
def test_a_config_tells_whether_the_length_counts(kind: str, own: dict[str, Any], depends: bool) -> None:
    assert depends_on_length(AutoConfig.for_model(kind, **own)) == depends
