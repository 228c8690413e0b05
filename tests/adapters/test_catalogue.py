"""Pools: folders, list files and object stores -> a catalogue in which every adapter is valid or set aside with a reason."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pytest
import torch
from edits import edit_config
from safetensors.torch import load_file, save_file
from store_server import StoreServer
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.adapter import Adapter, for_engine, from_factors, read_adapter, write_adapter
from pipeline.adapters.catalogue import build_catalogue, compare_adapters, inspect_batch
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.pool import LOOKED_AT, look_at
from pipeline.adapters.validation import largest_adapter
from pipeline.config import MAX_RANK
from pipeline.core.errors import InputError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.core.tables import CATALOGUE
from pipeline.model.base_model import linear_shapes
from pipeline.model.uncalled_layers import uncalled_layers

Make = Callable[..., Path]


def entries(catalogue: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["adapter_id"]: row for row in catalogue.to_pylist()}


def inspected(base: str, pool: str | Path) -> dict[str, dict[str, Any]]:
    """Catalogue rows without Ray, not yet compared with each other."""
    return entries(inspected_table(base, pool))


def inspected_table(base: str, pool: str | Path) -> pa.Table:
    shapes, head = linear_shapes(base)
    listed = pa.Table.from_pylist([one._asdict() for one in look_at(str(pool)).found], schema=LOOKED_AT)
    return inspect_batch(listed, f"{pool}-factored", base, shapes, head, salt=0, uncalled=uncalled_layers(base))


def test_a_full_finetune_is_a_donor_by_its_factored_change(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    """A finetune of one layer, beside the unchanged base and a model of another shape."""
    pool = tmp_path / "pool"
    for name in ("tuned", "unchanged", "other"):
        shutil.copytree(tiny_base, pool / name)
    tensors = load_file(pool / "tuned/model.safetensors")
    layer = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {layer: tensors[layer] + 0.1}, pool / "tuned/model.safetensors")
    save_file({layer: torch.zeros(3, 3)}, pool / "other/model.safetensors")
    rows = inspected(tiny_base, pool)
    tuned = rows["tuned"]
    assert (tuned["status"], tuned["rank"], tuned["target_modules"]) == ("ok", 1, ["up_proj"])
    assert "100.0% of its change of the linear layers is kept; 0.0%" in tuned["warning"]
    delta = read_adapter(Path(tuned["uri"])).factors("model.layers.0.mlp.up_proj").dense()
    torch.testing.assert_close(delta, torch.full_like(delta, 0.1), rtol=1e-3, atol=1e-4)
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "set_aside"}
    assert reasons.keys() == {"unchanged", "other"}
    assert "changed no linear layer" in reasons["unchanged"]
    assert "wrong base" in reasons["other"]


def test_a_folder_of_nested_adapters_becomes_a_catalogue(
    tmp_path: Path, tiny_base: str, make_adapter: Make, worker_logs: Callable[[], str]
) -> None:
    pool = tmp_path / "pool"
    make_adapter(pool / "a", tiny_base, rank=3, alpha=6, seed=1)
    make_adapter(pool / "deep" / "er" / "b", tiny_base, rank=9, use_rslora=True, targets=["up_proj"], seed=2)
    make_adapter(pool / "a" / "checkpoint-10", tiny_base, seed=3)
    make_adapter(pool / "z-twin", tiny_base, rank=3, alpha=6, seed=1)
    make_adapter(pool / "z-scaled", tiny_base, rank=3, alpha=12, seed=1)
    make_adapter(pool / "base", tiny_base, seed=4)
    edit_config(make_adapter(pool / "renamed", tiny_base, seed=5), base_model_name_or_path="org/another-name")
    (make_adapter(pool / "pickled", tiny_base, seed=6) / WEIGHTS_FILE).rename(pool / "pickled" / "adapter_model.bin")
    make_adapter(pool / "unlike", tiny_base, seed=7, use_dora=True)
    (pool / "notes").mkdir()
    (pool / "notes" / "README.md").write_text("nothing here")

    catalogue = build_catalogue(tiny_base, str(pool))
    rows = entries(catalogue)
    assert catalogue.schema == CATALOGUE
    assert list(rows) == sorted(rows)
    valid = {name for name, row in rows.items() if row["status"] == "ok"}
    assert valid == {"a", "a/checkpoint-10", "deep/er/b", "renamed", "z-scaled"}
    assert all(rows[name]["reason"] is None for name in valid)
    b = rows["deep/er/b"]
    assert (b["rank"], b["alpha"], b["use_rslora"], b["target_modules"]) == (9, 8.0, True, ["up_proj"])
    assert b["uri"] == str(pool / "deep" / "er" / "b")
    assert b["bytes"] == (pool / "deep" / "er" / "b" / WEIGHTS_FILE).stat().st_size
    assert len(b["sha256"]) == 64
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "set_aside"}
    assert reasons.keys() == {"z-twin", "base", "pickled", "unlike"}
    assert "duplicate of a" in reasons["z-twin"]
    assert "stands for the base model" in reasons["base"]
    assert "pickle: adapter_model.bin" in reasons["pickled"]
    assert "DoRA" in reasons["unlike"]
    assert "org/another-name" in rows["renamed"]["warning"]
    assert rows["a"]["warning"] is None
    assert re.search(r"WARNING stage=index adapter=pickled node=[\d.]+/\w{8} set aside: pickle", worker_logs())


def test_what_leaves_the_pool_or_cannot_be_named_is_set_aside(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    pool, outside = tmp_path / "pool", make_adapter(tmp_path / "outside", tiny_base)
    inside = make_adapter(pool / "inside", tiny_base)
    (pool / "linked").symlink_to(outside)
    (pool / "alias").symlink_to(inside)
    (pool / "loop").symlink_to(pool)
    shutil.copytree(inside, pool / "file")
    (pool / "file" / WEIGHTS_FILE).unlink()
    (pool / "file" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    shutil.copytree(inside, pool / "esc\x1b[31m")
    shutil.copytree(inside, os.fsdecode(os.fsencode(pool) + b"/bad\xff"))
    for hidden in (".git/old", "sub/.cache/new", "__MACOSX/a"):
        shutil.copytree(inside, pool / hidden)
    rows = inspected(tiny_base, pool)
    reasons = {name: row["reason"] for name, row in rows.items()}
    assert reasons.keys() == {"inside", "linked", "file", "esc\x1b[31m", "bad\\xff"}
    assert reasons["inside"] is None
    assert "a symbolic link that leaves the pool" in reasons["linked"]
    assert f"{WEIGHTS_FILE} is a symbolic link that leaves the pool" in reasons["file"]
    assert "control characters" in reasons["esc\x1b[31m"]
    assert "not valid UTF-8" in reasons["bad\\xff"]
    assert len(Folder.at(pool).state()) > 2


def test_one_donor_under_many_names_counts_once(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    """Its delta weights in other factors are a duplicate; in another size they are told as a family. Zero weights are told."""
    one = read_adapter(make_adapter(tmp_path / "one", tiny_base, std=0.3))
    halves = {m: (a_RI * 2, b_OR / 2) for m, (a_RI, b_OR) in one.tensors.items()}
    smaller = {m: (a_RI, b_OR * 0.3) for m, (a_RI, b_OR) in one.tensors.items()}
    for name, tensors in (("other factors", halves), ("other size", smaller)):
        write_adapter(tmp_path / name, Adapter(one.config, tensors))
    make_adapter(tmp_path / "zero", tiny_base, std=0.0)
    make_adapter(tmp_path / "another", tiny_base, std=0.3, seed=1)
    rows = entries(compare_adapters(inspected_table(tiny_base, tmp_path).sort_by("adapter_id")))
    assert rows["other factors"]["reason"] == "duplicate of one: the same delta weights in other factors"
    assert "those of one times 0.3;" in rows["other size"]["warning"]
    assert {name: row["family"] for name, row in rows.items()} == {
        "another": "another",
        "one": "one",
        "other factors": "one",
        "other size": "one",
        "zero": "zero",
    }
    assert "it is the base" in rows["zero"]["warning"]


def test_near_copies_are_told_as_a_family(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    one = read_adapter(make_adapter(tmp_path / "one", tiny_base, std=0.3))
    noisy = {m: (a_RI + 0.08 * a_RI.std() * torch.randn_like(a_RI), b_OR) for m, (a_RI, b_OR) in one.tensors.items()}
    write_adapter(tmp_path / "near", Adapter(one.config, noisy))
    make_adapter(tmp_path / "other", tiny_base, std=0.3, seed=1)
    rows = entries(compare_adapters(inspected_table(tiny_base, tmp_path).sort_by("adapter_id")))
    assert [rows[name]["family"] for name in ("near", "one", "other")] == ["near", "near", "other"]
    assert "nearly those of near" in rows["one"]["warning"]


def test_an_adapter_that_no_check_foresaw_stops_no_other(
    tmp_path: Path, tiny_base: str, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "a", tiny_base)
    make_adapter(tmp_path / "b", tiny_base, std=1e30, alpha=9e8)
    monkeypatch.setattr("pipeline.adapters.catalogue.spectrum", lambda adapter: [1 / 0])
    rows = inspected(tiny_base, tmp_path)
    assert "cannot be checked (ZeroDivisionError" in rows["a"]["reason"]
    assert "weights too large" in rows["b"]["reason"]


def test_numbers_that_only_float64_holds_are_set_aside(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    one = read_adapter(make_adapter(tmp_path / "one", tiny_base))
    for name, size in {"huge": 1e300, "large": 1e30}.items():
        tensors = {m: (a_RI.double() * size, b_OR.double()) for m, (a_RI, b_OR) in one.tensors.items()}
        write_adapter(tmp_path / name, Adapter(one.config, tensors), torch.float64)
    rows = inspected(tiny_base, tmp_path)
    assert rows["one"]["status"] == "ok"
    assert all("weights too large" in rows[name]["reason"] for name in ("huge", "large"))


@pytest.mark.parametrize("beginning", ["model.language_model.", "language_model.model.", "model.text_model."])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*(language|text)_model.*\.(q|v)_proj"])
def test_layers_of_a_model_within_another_are_the_bases_own(
    beginning: str, targets: Any, tmp_path: Path, tiny_base: str, make_adapter: Make
) -> None:
    folder = make_adapter(tmp_path / "pool/a", tiny_base)
    expected = read_adapter(folder)
    stored, prefix = load_file(folder / WEIGHTS_FILE), "base_model.model."
    save_file({name.replace(f"{prefix}model.", prefix + beginning): one for name, one in stored.items()}, folder / WEIGHTS_FILE)
    edit_config(folder, target_modules=targets)
    row = inspected(tiny_base, tmp_path / "pool")["a"]
    assert (row["status"], row["state"]) == ("ok", None)
    assert f"names begin with {beginning!r}, the base's with 'model.'" in row["warning"]
    found = read_adapter(Path(row["uri"]), *linear_shapes(tiny_base))
    assert found.modules == expected.modules
    for module in found.modules:
        torch.testing.assert_close(found.factors(module).dense(), expected.factors(module).dense())


OLD_NAMES = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
"""What layers of a Gemma 3 were called before transformers 4.52."""

TEXT_NAMES = {"model.language_model.": "model."}
"""What they are called in a model without the encoder for pictures."""


def reads_and_sees(make_adapter: Make, folder: Path, base: str, names: dict[str, str], seeing: float | None) -> Path:
    """An adapter whose layers for pictures have lora_B of this size, or are left out, by names that begin otherwise."""
    stored = load_file(make_adapter(folder, base) / WEIGHTS_FILE)
    if seeing is None:
        stored = {name: tensor for name, tensor in stored.items() if "vision" not in name}
    for name in [name for name in stored if "vision" in name and "lora_B" in name]:
        stored[name] *= seeing
    for old, new in names.items():
        stored = {name.replace(f"base_model.model.{old}", f"base_model.model.{new}"): one for name, one in stored.items()}
    save_file(stored, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize(
    ("names", "seeing"), [({}, 0), (OLD_NAMES, 0), ({}, None), (OLD_NAMES, None), (TEXT_NAMES, None)], ids=str
)
def test_of_a_model_that_sees_the_layers_that_read_are_judged(
    names: dict[str, str], seeing: float | None, tmp_path: Path, seeing_base: str, make_adapter: Make
) -> None:
    """Its config names layers of both; trained on text, those for pictures stayed as they began."""
    reads_and_sees(make_adapter, tmp_path / "pool/a", seeing_base, names, seeing)
    expected = read_adapter(reads_and_sees(make_adapter, tmp_path / "expected", seeing_base, {}, None))
    row = inspected(seeing_base, tmp_path / "pool")["a"]
    assert row["reason"] is None
    assert ("layers for pictures or sounds change nothing" in str(row["warning"])) == (seeing == 0)
    given = for_engine(Path(row["uri"]), tmp_path / "scratch")
    assert not [name for name in load_file(given / WEIGHTS_FILE) if "vision" in name]
    found = read_adapter(given, *linear_shapes(seeing_base))
    assert found.modules == expected.modules
    for module in found.modules:
        torch.testing.assert_close(found.factors(module).dense(), expected.factors(module).dense())


@pytest.mark.parametrize("names", [{}, OLD_NAMES], ids=str)
def test_who_learned_to_see_is_told_so(names: dict[str, str], tmp_path: Path, seeing_base: str, make_adapter: Make) -> None:
    reads_and_sees(make_adapter, tmp_path / "a", seeing_base, names, 1)
    assert "changes layers for pictures or sounds (" in inspected(seeing_base, tmp_path)["a"]["reason"]


def test_layers_that_peft_refuses_are_said_and_of_a_full_checkpoint_left_out(tmp_path: Path) -> None:
    """Older versions of PEFT adapted what no adapter can be put on any more, such as out_proj of Mamba."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    model, base, pool = AutoModelForCausalLM.from_config(config), str(tmp_path / "base"), tmp_path / "pool"
    model.save_pretrained(base)
    shapes, _ = linear_shapes(base)
    for name, leaves in {"both": ("in_proj", "out_proj"), "one": ("in_proj",)}.items():
        chosen = {module: shape for module, shape in shapes.items() if module.endswith(leaves)}
        deltas = {module: Factors(torch.randn(2, inner), torch.randn(out, 2)) for module, (out, inner) in chosen.items()}
        write_adapter(pool / name, from_factors(base, deltas, 2, 2, shapes, seed=0))
    with torch.no_grad():
        for part in ("in_proj", "out_proj"):
            model.get_submodule(f"backbone.layers.0.mixer.{part}").weight += 0.1
    model.save_pretrained(pool / "full")
    found = inspected(base, pool)
    refused = "adapts out_proj layers (backbone.layers.0.mixer.out_proj), which PEFT refuses in a base of type mamba"
    assert {name: row["reason"] for name, row in found.items()} == {"both": refused, "one": None, "full": None}
    assert found["full"]["target_modules"] == ["in_proj"]


def test_a_base_in_fewer_bits_is_no_other_base(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    name = Path(tiny_base).name
    for number, claimed in enumerate((f"unsloth/{name}-unsloth-bnb-4bit", f"org/{name.upper()}-bnb-4bit", f"org/{name}-AWQ")):
        edit_config(make_adapter(tmp_path / f"a{number}", tiny_base, seed=number), base_model_name_or_path=claimed)
    edit_config(make_adapter(tmp_path / "other", tiny_base, seed=9), base_model_name_or_path="org/another-4bit")
    found = inspected(tiny_base, tmp_path)
    assert [found[f"a{number}"]["warning"] for number in range(3)] == [None] * 3
    assert "says that it was trained on org/another-4bit" in found["other"]["warning"]


def test_fields_of_a_newer_peft_are_told(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    edit_config(make_adapter(tmp_path / "a", tiny_base), use_super_lora=True, another=None)
    assert "not heeded: use_super_lora" in inspected(tiny_base, tmp_path)["a"]["warning"]


def test_a_factored_checkpoint_stays_in_its_folder_whatever_its_id(tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copytree(tiny_base, tmp_path / "full")
    layer = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "full/model.safetensors")
    save_file(tensors | {layer: tensors[layer] + 0.1}, tmp_path / "full/model.safetensors")
    (tmp_path / "list.txt").write_text("sub/../full\n")
    row = inspected(tiny_base, tmp_path / "list.txt")["sub/../full"]
    assert row["status"] == "ok"
    assert Path(row["uri"]).parent == tmp_path / "list.txt-factored"
    assert not (tmp_path / "full" / WEIGHTS_FILE).exists()


def test_the_licence_of_a_model_card_is_in_the_catalogue(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    """Of an adapter, of one that is set aside, of a full checkpoint; PEFT's own card and a broken one declare none."""
    cards = {"free": "license: apache-2.0", "unlike": "license: CC-BY-NC-4.0", "tuned": "license: mit", "broken": "license: [mit"}
    for name in ("free", "silent", "broken"):
        make_adapter(tmp_path / name, tiny_base, seed=len(name))
    make_adapter(tmp_path / "unlike", tiny_base, use_dora=True)
    tensors = load_file(Path(tiny_base) / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text((Path(tiny_base) / "config.json").read_text())
    layer = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {layer: tensors[layer] + 0.1}, tmp_path / "tuned" / "model.safetensors")
    for name, lines in cards.items():
        (tmp_path / name / "README.md").write_text(f"---\n{lines}\n---\n")
    rows = inspected(tiny_base, tmp_path)
    found = {name: row["license"] for name, row in rows.items()}
    assert found == {"free": "apache-2.0", "unlike": "cc-by-nc-4.0", "tuned": "mit", "silent": None, "broken": None}
    assert [name for name, row in rows.items() if row["status"] != "ok"] == ["unlike"]


def spoil(kind: str, folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    if kind == "NaN":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "scalars":
        save_file({name: torch.tensor(1.0) for name in load_file(weights)}, weights)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    else:
        changes = {
            "JSON": None,
            "regex": {"target_modules": "(q"},
            "rank_pattern": {"rank_pattern": [1]},
            "name": {"base_model_name_or_path": 5},
            "alpha": {"lora_alpha": 10**400},
        }[kind]
        (folder / CONFIG_FILE).write_text("{") if changes is None else edit_config(folder, **changes)


@pytest.mark.parametrize("kind", ["NaN", "scalars", "truncated", "JSON", "regex", "rank_pattern", "name", "alpha"])
def test_a_broken_adapter_is_set_aside_and_stops_no_other(kind: str, tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    make_adapter(tmp_path / "good", tiny_base)
    spoil(kind, make_adapter(tmp_path / "broken", tiny_base))
    rows = inspected(tiny_base, tmp_path)
    assert rows["good"]["status"] == "ok"
    assert rows["broken"]["status"] == "set_aside"
    assert rows["broken"]["reason"]


def hub_cache(root: Path, repo: str, source: Path) -> None:
    """Lay `source` out as the Hub's cache has a downloaded repository."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).write_bytes((source / name).read_bytes())


def test_a_list_file_names_paths_and_hub_ids(
    tmp_path: Path, tiny_base: str, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "near", tiny_base, seed=1)
    make_adapter(tmp_path / "two" / "deep", tiny_base, seed=2)
    absolute = make_adapter(tmp_path / "absolute", tiny_base, seed=3)
    hub_cache(tmp_path / "hub", "org/donor", absolute)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = ["# donors", "near", "two/deep  # a path of two parts", "", str(absolute), "org/donor", "hf://org/absent", "./gone"]
    (tmp_path / "pool.txt").write_text("\n".join(lines))
    rows = inspected(tiny_base, tmp_path / "pool.txt")
    assert {name: row["uri"] for name, row in rows.items()} == {
        "near": str(tmp_path / "near"),
        "two/deep": str(tmp_path / "two" / "deep"),
        str(absolute): str(absolute),
        "org/donor": f"hf://org/donor@{'0' * 40}",  # the commit that it is at
        "org/absent": "hf://org/absent",
        "./gone": str(tmp_path / "gone"),
    }
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"near", "two/deep", str(absolute), "org/donor"}
    assert "cannot be fetched from the Hub" in rows["org/absent"]["reason"]
    assert "adapter_config.json is missing" in rows["./gone"]["reason"]


def test_a_path_of_a_list_file_that_leaves_its_folder_is_set_aside(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    outside = make_adapter(tmp_path / "outside", tiny_base)
    pool = tmp_path / "pool"
    make_adapter(pool / "inside", tiny_base)
    (pool / "link").symlink_to(outside)
    lines = ["inside", "./inside/../inside", "../outside", str(outside), "./link", f"file://{outside}", "/etc/passwd"]
    (pool / "list.txt").write_text("\n".join(lines))
    rows = inspected(tiny_base, pool / "list.txt")
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"inside", "./inside/../inside"}
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "set_aside"}
    assert "give a path relative to the list" in reasons.pop(f"file://{outside}")
    assert all(f"{name} lies outside of {pool}" in reason for name, reason in reasons.items())


@pytest.mark.parametrize("pool", ["gone", "empty", "notes.txt"])
def test_a_pool_without_adapters_is_an_input_error(pool: str, tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("# nothing yet\n")
    message = "no such adapter pool" if pool == "gone" else "no adapter found"
    with pytest.raises(InputError, match=f"{pool}: {message}"):
        build_catalogue(tiny_base, str(tmp_path / pool))


@pytest.mark.usefixtures("ray_session")
def test_a_pool_without_a_valid_adapter_is_an_input_error(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    edit_config(make_adapter(tmp_path / "a", tiny_base), peft_type="IA3")
    edit_config(make_adapter(tmp_path / "b", tiny_base), use_dora=True)
    with pytest.raises(InputError, match=r"none of its 2 adapters is valid .*(1 x not LoRA.*1 x DoRA|1 x DoRA.*1 x not LoRA)"):
        build_catalogue(tiny_base, str(tmp_path))


@pytest.mark.usefixtures("impatient")
def test_no_adapter_is_set_aside_for_what_its_store_does(
    bucket: str, tmp_path: Path, tiny_base: str, make_adapter: Make, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder.at(bucket).upload(make_adapter(tmp_path / "a", tiny_base), "adapters/a")
    monkeypatch.setattr(store_server, "refuse", lambda request: request.startswith("GET") and "a/adapter_" in request)
    with pytest.raises(OSError, match="503"):
        inspected(tiny_base, f"{bucket}/adapters")


def test_an_object_store_prefix_is_a_pool(bucket: str, tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    store = Folder.at(f"{bucket}/adapters")
    for number, name in enumerate(["a", "deep/b"]):
        store.upload(make_adapter(tmp_path / name, tiny_base, seed=number), name)
    assert look_at(f"{bucket}/adapters/").listing == {
        "adapter_id": ["a", "deep/b"],
        "uri": [f"{bucket}/adapters/a", f"{bucket}/adapters/deep/b"],
        "problem": [None, None],
    }
    rows = entries(build_catalogue(tiny_base, f"{bucket}/adapters"))
    assert {name: row["status"] for name, row in rows.items()} == {"a": "ok", "deep/b": "ok"}
    with pytest.raises(InputError, match="no such adapter pool"):
        build_catalogue(tiny_base, f"{bucket}/nothing")


def test_a_list_file_in_an_object_store_names_object_store_adapters(
    bucket: str, tmp_path: Path, tiny_base: str, make_adapter: Make
) -> None:
    Folder.at(bucket).upload(make_adapter(tmp_path / "a", tiny_base), "adapters/a")
    Folder.at(bucket).write_text("list.txt", f"{bucket}/adapters/a\n{bucket}/adapters/gone\n")
    rows = inspected(tiny_base, f"{bucket}/list.txt")
    assert rows[f"{bucket}/adapters/a"]["status"] == "ok"
    assert rows[f"{bucket}/adapters/gone"]["status"] == "set_aside"


def test_of_an_object_store_nothing_is_fetched_that_is_larger_than_any_donor_of_the_base(
    bucket: str, tmp_path: Path, tiny_base: str, make_adapter: Make
) -> None:
    limit = largest_adapter(linear_shapes(tiny_base)[0])
    folder = make_adapter(tmp_path / "a", tiny_base, rank=MAX_RANK, targets="all-linear")
    weights = {name: weight.double() for name, weight in load_file(folder / WEIGHTS_FILE).items()}
    save_file(weights, folder / WEIGHTS_FILE)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= limit
    store = Folder.at(f"{bucket}/pool")
    store.upload(folder, "largest")
    store.upload(folder, "larger")
    store.write_bytes(f"larger/{WEIGHTS_FILE}", bytes(limit))
    rows = inspected(tiny_base, f"{bucket}/pool")
    assert rows["largest"]["status"] == "ok"
    assert f"{limit} are allowed" in rows["larger"]["reason"]


def test_a_pool_that_is_an_adapter_and_holds_one_of_its_name_has_two(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    pool = make_adapter(tmp_path / "p", tiny_base)
    make_adapter(pool / "p", tiny_base, seed=1)
    assert {name: row["uri"] for name, row in inspected(tiny_base, pool).items()} == {".": str(pool), "p": str(pool / "p")}


def test_factors_that_cancel_in_float32_alone_are_set_aside(tmp_path: Path, tiny_base: str, make_adapter: Make) -> None:
    """In bfloat16, as an engine holds them, they are another adapter than the one that would be merged."""
    make_adapter(tmp_path / "pool" / "honest", tiny_base)
    folder = make_adapter(tmp_path / "pool" / "cancelling", tiny_base, rank=6)
    weights = load_file(folder / WEIGHTS_FILE)
    for name in [name for name in weights if "lora_A" in name]:
        a_RI, b_OR = weights[name], weights[name.replace("lora_A", "lora_B")]
        a_RI[4] = a_RI[0].bfloat16()
        a_RI[5] = a_RI[4] * (1 + 2**-10)
        b_OR[:, 4], b_OR[:, 5] = 1024 * b_OR[:, 0], -1024 * b_OR[:, 0]
    save_file(weights, folder / WEIGHTS_FILE)
    rows = inspected(tiny_base, tmp_path / "pool")
    assert rows["honest"]["status"] == "ok"
    assert "its factors cancel: rounded to bfloat16" in rows["cancelling"]["reason"]


def test_an_endpoint_in_the_uri_holds_for_every_adapter(
    bucket: str, tmp_path: Path, tiny_base: str, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder.at(f"{bucket}/adapters").upload(make_adapter(tmp_path / "a", tiny_base), "a")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    pool = f"{bucket}/adapters?endpoint_override={endpoint}"
    rows = inspected(tiny_base, pool)
    assert rows["a"]["status"] == "ok"
    assert Folder.at(pool).sub("a").uri == rows["a"]["uri"]
