"""Full finetunes factored to adapters, against their dense differences to the base."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import write_adapter
from pipeline.adapters.checkpoint import ENERGY, MAX_RANK, Factored, factor_checkpoint, is_checkpoint
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import INDEX_FILE
from pipeline.core.storage import MAX_HEADER_BYTES
from pipeline.model.base_model import linear_shapes

CHANGED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def finetune(base: str, target: Path, rank: int, embeddings: float = 0, shard: str = "50GB", dtype: Any = torch.float32) -> Any:
    """The base with random changes of that rank in two layers, and of that size in its embeddings."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in CHANGED:
            weight = model.get_submodule(module).weight
            out, inside = weight.shape
            weight += 0.05 * torch.randn(out, rank, generator=generator) @ torch.randn(rank, inside, generator=generator)
        weight = model.get_input_embeddings().weight
        weight += embeddings * torch.randn(weight.shape, generator=generator)
    model.to(dtype).save_pretrained(str(target), max_shard_size=shard)
    return model


def factored(folder: Path, base: str) -> Factored:
    assert is_checkpoint(folder)
    return factor_checkpoint(folder, base, *linear_shapes(base))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return found


def test_a_low_rank_change_becomes_an_adapter_that_computes_the_same(tmp_path: Path, tiny_base: str) -> None:
    """From several shards."""
    model = finetune(tiny_base, tmp_path / "full", rank=1, shard="100KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1
    found = factored(tmp_path / "full", tiny_base)
    assert (found.adapter.modules, found.adapter.max_rank) == (sorted(CHANGED), 1)
    assert (found.kept, found.elsewhere) == (pytest.approx(1, abs=1e-4), 0)
    write_adapter(tmp_path / "adapter", found.adapter)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))), logits(model), rtol=1e-3, atol=1e-3
    )


def test_the_smallest_rank_that_keeps_the_energy_is_taken_and_what_is_lost_is_told(tmp_path: Path, tiny_base: str) -> None:
    model = finetune(tiny_base, tmp_path / "full", rank=20, embeddings=0.1)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    change = {
        name: (new - old).detach() for (name, new), (_, old) in zip(*(m.named_parameters() for m in (model, base)), strict=True)
    }
    spectra = [torch.linalg.svdvals(change[f"{module}.weight"]) ** 2 for module in CHANGED]
    linear = sum(float(squares.sum()) for squares in spectra)
    rank = next(r for r in range(1, MAX_RANK) if sum(float(squares[:r].sum()) for squares in spectra) >= ENERGY * linear)

    found = factored(tmp_path / "full", tiny_base)
    assert found.adapter.max_rank == rank
    left = sum(float(((change[f"{m}.weight"] - found.adapter.factors(m).dense()) ** 2).sum()) for m in CHANGED)
    assert found.kept == pytest.approx(1 - left / linear, abs=1e-3)
    whole = sum(float((delta**2).sum()) for delta in change.values())
    assert found.elsewhere == pytest.approx(1 - linear / whole, abs=1e-4)
    assert f"{found.kept:.1%} of its change" in found.describe()


def test_what_storing_in_bfloat16_rounds_is_no_change(tmp_path: Path, tiny_base: str) -> None:
    finetune(tiny_base, tmp_path / "full", rank=2, dtype=torch.bfloat16)
    assert factored(tmp_path / "full", tiny_base).adapter.modules == sorted(CHANGED)


def saved_otherwise(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


def with_rows(tensors: dict[str, torch.Tensor], rows: int) -> None:
    for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        padded = torch.cat([tensors[name], torch.ones(64, tensors[name].shape[1])])
        tensors[name] = padded[: len(tensors[name]) + rows]


HOW_SAVED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "compiled": lambda t: rename(t, "", "_orig_mod."),
    "in parallel": lambda t: rename(t, "", "module."),
    "both": lambda t: rename(t, "", "module._orig_mod."),
    "within another model": lambda t: rename(t, "model.", "language_model.model."),
    "without what holds it": lambda t: rename(t, "model.", ""),
    "a padded vocabulary": lambda t: with_rows(t, 64),
    "a cut vocabulary": lambda t: with_rows(t, -3),
    "what is computed": lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "an encoder for pictures": lambda t: t.update({"vision_tower.layers.0.fc1.weight": torch.ones(4, 4)}),
}


@pytest.mark.parametrize("how", HOW_SAVED)
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_however_a_finetune_was_saved_it_is_one_of_the_base(
    how: str, which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    finetune(base, tmp_path / "full", rank=1)
    expected = factored(tmp_path / "full", base)
    found = factored(saved_otherwise(tmp_path / "full", HOW_SAVED[how]), base)
    assert (found.adapter.modules, found.kept, found.elsewhere) == (expected.adapter.modules, expected.kept, 0)
    for module in CHANGED:
        assert torch.equal(found.adapter.factors(module).dense(), expected.adapter.factors(module).dense())


@pytest.mark.parametrize("part", ["the whole", "the language model"])
def test_a_finetune_of_a_model_that_sees_is_factored_to_layers_of_the_model(part: str, tmp_path: Path, seeing_base: str) -> None:
    """Files of such have other names than the model's layers; what it learned to see is lost, and counted."""
    module, prefix = "model.language_model.layers.0.self_attn.q_proj", "language_model."
    shutil.copytree(seeing_base, tmp_path / "full")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith(("0.self_attn.q_proj.weight", "0.mlp.fc1.weight")) and ("vision" not in name or part == "the whole"):
                tensors[name] += 0.1
            elif part != "the whole" and not name.startswith(prefix):
                del tensors[name]
        rename(tensors, prefix, prefix if part == "the whole" else "")

    found = factored(saved_otherwise(tmp_path / "full", change), seeing_base)
    assert found.adapter.modules == [module]
    delta = found.adapter.factors(module).dense()
    torch.testing.assert_close(delta, torch.full_like(delta, 0.1), rtol=1e-3, atol=1e-4)
    assert (found.elsewhere > 0) == (part == "the whole")


def test_one_tensor_under_two_names_is_refused(tmp_path: Path, tiny_base: str) -> None:
    finetune(tiny_base, tmp_path / "full", rank=1)
    twice = saved_otherwise(tmp_path / "full", lambda t: t.update({"module.model.norm.weight": t["model.norm.weight"] + 1}))
    with pytest.raises(AdapterError, match=r"corrupt weights: \S*norm.weight is there twice"):
        factored(twice, tiny_base)


def test_what_is_no_finetune_of_the_base_is_refused(tmp_path: Path, tiny_base: str, untied_base: str) -> None:
    with pytest.raises(AdapterError, match="changed no linear layer"):
        factored(Path(tiny_base), tiny_base)
    finetune(tiny_base, tmp_path / "full", rank=1)
    file = next((tmp_path / "full").glob("*.safetensors"))
    tensors = load_file(file)
    name = f"{CHANGED[0]}.weight"
    for wrong, message in (
        (tensors | {"model.layers.9.extra.weight": torch.zeros(2)}, "wrong base: .* model.layers.9.extra.weight"),
        (tensors | {name: torch.zeros(2, 3)}, r"wrong base: .* is \(2, 3\)"),
        (tensors | {"model.embed_tokens.weight": torch.zeros(400, 3)}, r"wrong base: model.embed_tokens.weight is \(400, 3\)"),
        ({key: one for key, one in tensors.items() if key != name}, f"missing weights: .* no tensor {name}"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, "NaN or Inf in"),
        (tensors | {name: torch.full_like(tensors[name], 1e30)}, "weights too large: the change of"),
    ):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            factored(tmp_path / "full", tiny_base)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="corrupt weights"):
        factored(tmp_path / "full", tiny_base)


def test_an_adapter_or_a_folder_without_weights_is_no_checkpoint(tmp_path: Path, tiny_base: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "both")
    (tmp_path / "both/adapter_config.json").write_text("{}")
    assert not is_checkpoint(tmp_path / "both")
    assert not is_checkpoint(tmp_path)


def test_files_that_transformers_does_not_read_are_not_read(tmp_path: Path, tiny_base: str) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    finetune(tiny_base, tmp_path / "full", rank=1)
    expected = factored(tmp_path / "full", tiny_base)
    weights = {name: weight + 9 for name, weight in load_file(tmp_path / "full" / "model.safetensors").items()}
    save_file(weights, tmp_path / "full" / "z.safetensors")
    save_file({"layers.0.attention.wk.weight": torch.zeros(4, 4)}, base / "consolidated.safetensors")
    found = factored(tmp_path / "full", str(base))
    for module in CHANGED:
        torch.testing.assert_close(found.adapter.factors(module).dense(), expected.adapter.factors(module).dense())


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ('{"weight_map": {"a": "../base/model.safetensors"}}', "names '../base/model.safetensors', which is no file"),
        ('{"weight_map": {"a": 5}}', "names no files"),
        ("[]", "names no files"),
        ("{", "names no files"),
        (" " * (MAX_HEADER_BYTES + 1), "are allowed"),
    ],
    ids=["outside", "a number", "no object", "no JSON", "too large"],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(index: str, reason: str, tmp_path: Path, tiny_base: str) -> None:
    finetune(tiny_base, tmp_path / "full", rank=1, shard="100KB")
    (tmp_path / "full" / INDEX_FILE).write_text(index)
    with pytest.raises(AdapterError, match=reason):
        factored(tmp_path / "full", tiny_base)
