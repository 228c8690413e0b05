"""Adapters with a part that their base reads past: nothing is scored or merged as what it is not."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_catalogue import inspected
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.adapter import from_factors, put_on, read_adapter, write_adapter
from pipeline.adapters.low_rank import Factors
from pipeline.model.base_model import linear_shapes

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
OF_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
BASES = {"jamba": SIZES | ATTENTION | OF_JAMBA, "falcon_mamba": SIZES | {"state_size": 4}}

IDS = torch.arange(3, 19)[None]


@pytest.fixture(params=BASES)
def mamba(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **BASES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def write(folder: Path, base: str, sizes: Mapping[str, float]) -> None:
    """An adapter on layers that are so called, with lora_B of these sizes."""
    shapes, _ = linear_shapes(base)
    torch.manual_seed(1)
    drawn = {module: Factors(torch.randn(2, inner), torch.randn(out, 2)) for module, (out, inner) in shapes.items()}
    chosen = {module: size for module in drawn if (size := sizes.get(module.rpartition(".")[2])) is not None}
    deltas = {module: Factors(drawn[module].a_RI, size * drawn[module].b_OR) for module, size in chosen.items()}
    write_adapter(folder, from_factors(base, deltas, 2, 2, shapes, seed=0))


def test_a_part_that_is_read_past_an_adapter_is_left_out_where_it_changes_nothing(mamba: str, tmp_path: Path) -> None:
    """As PEFT leaves it, which trains no such part. What is left is scored as the whole is by plain transformers and PEFT."""
    write(tmp_path / "pool/a", mamba, {"in_proj": 0.3, "dt_proj": 0.0})
    row = inspected(mamba, tmp_path / "pool")["a"]
    assert (row["status"], row["target_modules"], row["state"]) == ("ok", ["in_proj"], None)
    assert "its dt_proj layers change nothing" in row["warning"]
    assert read_adapter(Path(row["uri"]), *linear_shapes(mamba)).target_leaves == ["in_proj"]
    base, whole, left = (AutoModelForCausalLM.from_pretrained(mamba).eval() for _ in range(3))
    with torch.no_grad():
        expected = put_on(whole, tmp_path / "pool/a", mamba)(IDS, use_cache=False).logits
        torch.testing.assert_close(put_on(left, Path(row["uri"]), mamba)(IDS, use_cache=False).logits, expected)
        assert (expected - base(IDS, use_cache=False).logits).abs().max() > 0.01


def test_a_part_that_is_read_past_an_adapter_sets_it_aside_where_it_was_trained(mamba: str, tmp_path: Path) -> None:
    """PEFT gives the logits of the rest alone, and a merge into the weights others."""
    write(tmp_path / "pool/both", mamba, {"in_proj": 0.3, "dt_proj": 0.3})
    write(tmp_path / "pool/empty", mamba, {"dt_proj": 0.0})
    write(tmp_path / "rest", mamba, {"in_proj": 0.3})
    found = inspected(mamba, tmp_path / "pool")
    assert "changes dt_proj layers (" in found["both"]["reason"]
    assert "past an adapter: PEFT would leave this part out" in found["both"]["reason"]
    assert "past an adapter, and no others" in found["empty"]["reason"]
    adapter = read_adapter(tmp_path / "pool/both")
    parts, whole, merged = (AutoModelForCausalLM.from_pretrained(mamba).eval() for _ in range(3))
    with torch.no_grad():
        for module in adapter.modules:
            merged.get_submodule(module).weight += adapter.factors(module).dense()
        as_peft = put_on(whole, tmp_path / "pool/both", mamba)(IDS, use_cache=False).logits
        torch.testing.assert_close(as_peft, put_on(parts, tmp_path / "rest", mamba)(IDS, use_cache=False).logits)
        assert (as_peft - merged(IDS, use_cache=False).logits).abs().max() > 0.01


def test_of_a_full_checkpoint_what_no_adapter_acts_on_is_told_as_lost(mamba: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mamba)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("in_proj.weight", "dt_proj.weight")):
                weights += 0.1
    model.save_pretrained(tmp_path / "pool/full")
    row = inspected(mamba, tmp_path / "pool")["full"]
    assert (row["reason"], row["target_modules"]) == (None, ["in_proj"])
    assert "is elsewhere, and lost" in row["warning"]
    assert "0.0% of its whole change is elsewhere" not in row["warning"]
