"""Merged adapters, loaded by PEFT, against the base with the dense mean of the donors' deltas added to its weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.adapters.adapter import Adapter, read_adapter, write_adapter
from pipeline.adapters.low_rank import DENSITY, Factors, ab_mean
from pipeline.config import METHODS
from pipeline.core.errors import AdapterError
from pipeline.merge.recipes import FUNCTIONS, Merged, Recipe, merge, random_like
from pipeline.model.base_model import linear_shapes

MIXED: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
    {"rank": 9, "alpha": 6, "targets": "all-linear", "use_rslora": True},
    {"rank": 2, "alpha": 1, "targets": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 4}},
]
ALIKE: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}]


@pytest.fixture
def donors_of(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Callable[..., list[Adapter]]:
    def donors(kinds: Sequence[dict[str, Any]]) -> list[Adapter]:
        folders = [
            make_adapter(tmp_path / f"donor-{n}", tiny_base, **{"seed": n, "std": 0.2} | kind) for n, kind in enumerate(kinds)
        ]
        return [read_adapter(folder) for folder in folders]

    return donors


def merged_by(base: str, donors: Sequence[Adapter], method: str, rank: int, weights: Sequence[float] | None = None) -> Merged:
    weights = weights or [1 / len(donors)] * len(donors)
    recipe = Recipe(tuple(str(n) for n in range(len(donors))), tuple(weights), method, rank)
    return merge(recipe, donors, base, linear_shapes(base)[0])


def dense_sum(donors: Sequence[Adapter], weights: Sequence[float], module: str) -> Tensor:
    pairs = [(d, w) for d, w in zip(donors, weights, strict=True) if module in d.tensors]
    return sum((w * d.factors(module).dense() for d, w in pairs), torch.zeros(()))


def logits_with_deltas(base: str, deltas: dict[str, Tensor]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for module, delta in deltas.items():
            model.get_submodule(module).weight += delta
        return model(input_ids=ids()).logits


def logits_by_peft(base: str, folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()(input_ids=ids()).logits


def ids() -> Tensor:
    return torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.0, -0.2)])
def test_mixed_donors_merged_exactly_give_the_logits_of_the_dense_mean(
    weights: tuple[float, ...], tmp_path: Path, tiny_base: str, donors_of: Callable[..., list[Adapter]]
) -> None:
    donors = donors_of(MIXED)
    merged = merged_by(tiny_base, donors, "exact", rank=18, weights=weights)
    write_adapter(tmp_path / "mashup", merged.adapter)
    read_adapter(tmp_path / "mashup", *linear_shapes(tiny_base))
    modules = set().union(*(donor.tensors for donor in donors))
    expected = logits_with_deltas(tiny_base, {module: dense_sum(donors, weights, module) for module in modules})
    found = logits_by_peft(tiny_base, tmp_path / "mashup")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits_with_deltas(tiny_base, {})).abs().max() > 0.1
    assert merged.kept_energy == pytest.approx(1.0, abs=1e-5)


def test_a_small_rank_keeps_the_best_part_of_each_module(tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    donors = donors_of(MIXED)
    merged = merged_by(tiny_base, donors, "exact", rank=3)
    energies = []
    for module in merged.adapter.modules:
        u, s, vh = torch.linalg.svd(dense_sum(donors, [1 / 3] * 3, module), full_matrices=False)
        torch.testing.assert_close(merged.adapter.factors(module).dense(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-3, atol=1e-4)
        energies.append(float((s[:3] ** 2).sum() / (s**2).sum()))
    assert merged.adapter.max_rank == 3
    assert merged.kept_energy == pytest.approx(min(energies), abs=1e-4)


def test_one_donor_merged_is_that_donor(tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    donor = donors_of(MIXED[1:2])[0]
    merged = merged_by(tiny_base, [donor], "exact", rank=9).adapter
    assert merged.modules == donor.modules
    for module in donor.modules:
        torch.testing.assert_close(merged.factors(module).dense(), donor.factors(module).dense(), rtol=1e-3, atol=1e-5)
        assert merged.scale(module) == pytest.approx(donor.scale(module))


def test_a_larger_rank_is_filled_with_rank_that_can_learn(tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    donors = donors_of(ALIKE)
    merged = merged_by(tiny_base, donors, "exact", rank=12).adapter
    for module in merged.modules:
        a_RI, b_OR = merged.tensors[module]
        assert a_RI.shape[0] == b_OR.shape[1] == 12
        assert torch.all(a_RI[8:].abs().sum(dim=1) > 0)
        assert torch.all(b_OR[:, 8:] == 0)
        torch.testing.assert_close(merged.factors(module).dense(), dense_sum(donors, [0.5, 0.5], module), rtol=1e-3, atol=1e-5)


def test_ab_mean_of_alike_donors_is_the_product_of_means(tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    donors = donors_of(ALIKE)
    merged = merged_by(tiny_base, donors, "ab_mean", rank=4).adapter
    exact = merged_by(tiny_base, donors, "exact", rank=8).adapter
    for module in merged.modules:
        expected = ab_mean([donor.factors(module) for donor in donors], [0.5, 0.5]).dense()
        torch.testing.assert_close(merged.factors(module).dense(), expected, rtol=1e-3, atol=1e-5)
        assert (expected - exact.factors(module).dense()).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    "other", [{"rank": 5}, {"alpha": 9}, {"use_rslora": True}, {"targets": ["q_proj"]}, {"rank_pattern": {"q_proj": 6}}]
)
def test_ab_mean_refuses_mixed_donors(other: dict[str, Any], tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    with pytest.raises(AdapterError, match="ab_mean needs donors of one rank, alpha and set of target modules"):
        merged_by(tiny_base, donors_of([{}, other]), "ab_mean", rank=4)


@pytest.mark.parametrize("alpha", [0, -8])
def test_a_first_donor_of_no_or_negative_scale_gives_finite_weights(
    alpha: float, tmp_path: Path, tiny_base: str, donors_of: Callable[..., list[Adapter]]
) -> None:
    donors = donors_of([{"alpha": alpha}, {}])
    merged = merged_by(tiny_base, donors, "exact", rank=8).adapter
    write_adapter(tmp_path / "mashup", merged)
    again = read_adapter(tmp_path / "mashup", *linear_shapes(tiny_base))
    for module in again.modules:
        torch.testing.assert_close(again.factors(module).dense(), dense_sum(donors, [0.5, 0.5], module), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_dense_methods_merge_mixed_donors(
    method: str, tmp_path: Path, tiny_base: str, donors_of: Callable[..., list[Adapter]]
) -> None:
    """At full rank the adapter is the method applied to the donors' dense delta weights."""
    donors = donors_of(MIXED)
    merged = merged_by(tiny_base, donors, method, rank=256)
    assert merged.kept_energy == pytest.approx(1.0, abs=1e-4)
    for module in merged.adapter.modules:
        having = [donor.factors(module) for donor in donors if module in donor.tensors]
        expected = FUNCTIONS[method](having, [1 / 3] * len(having))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(merged.adapter.factors(module).dense(), expected, rtol=1e-3, atol=1e-5)
    write_adapter(tmp_path / "mashup", merged.adapter)
    read_adapter(tmp_path / "mashup", *linear_shapes(tiny_base))


def test_a_random_adapter_has_the_norms_of_the_given_one_and_nothing_else_of_it(
    tiny_base: str, donors_of: Callable[..., list[Adapter]]
) -> None:
    merged = merged_by(tiny_base, donors_of(MIXED), "exact", rank=6).adapter
    drawn = random_like(merged, tiny_base, linear_shapes(tiny_base)[0])
    assert (drawn.modules, drawn.max_rank) == (merged.modules, 6)
    for module in merged.modules:
        old, new = merged.factors(module).dense(), drawn.factors(module).dense()
        assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-3)
        assert abs(float((old * new).sum())) < 0.3 * float(old.norm()) ** 2


def test_a_recipe_is_named_by_method_size_and_weighting() -> None:
    recipe = Recipe(("a", "b"), (0.5, 0.5), "exact", 8)
    assert recipe.name == "exact-2"
    about = {
        "donors": ("a", "b"),
        "weights": (0.5, 0.5),
        "method": "exact",
        "rank": 8,
        "weighting": "equal",
        "module_weights": None,
    }
    assert recipe.as_dict() == {"name": "exact-2", **about}
    assert Recipe(("a", "b"), (0.7, 0.3), "ties", 8, "gains").name == "ties-2-gains"


def test_a_merge_learns_as_fast_as_its_first_donor(tiny_base: str, donors_of: Callable[..., list[Adapter]]) -> None:
    donors = donors_of([{"rank": 2, "alpha": 6}, {"rank": 4, "alpha": 4}])
    shapes = linear_shapes(tiny_base)[0]
    for rank, alpha in ((2, 6), (8, 12)):
        merged = merge(Recipe(("a", "b"), (0.5, 0.5), "exact", rank), donors, tiny_base, shapes).adapter
        assert (merged.config.r, merged.config.lora_alpha) == (rank, alpha)


@pytest.mark.parametrize("method", ["exact", "dare"])
def test_a_merge_is_computed_on_its_device_and_comes_back(
    method: str, tiny_base: str, donors_of: Callable[..., list[Adapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that stands in for a GPU: what is moved there is computed with, and what comes back is from there."""
    donors, moves = donors_of([{"rank": 2}, {"rank": 3}]), list[str]()
    recipe, shapes = Recipe(("a", "b"), (0.5, 0.5), method, 4), linear_shapes(tiny_base)[0]
    here = merge(recipe, donors, tiny_base, shapes).adapter

    def to(self: Factors, device: torch.device) -> Factors:
        moves.append(device.type)
        return Factors(self.a_RI.clone(), self.b_OR.clone())

    monkeypatch.setattr(Factors, "to", to)
    there = merge(recipe, donors, tiny_base, shapes, on=torch.device("cuda")).adapter
    assert moves == ["cuda", "cuda", "cpu"] * len(here.modules)
    for module in here.modules:
        torch.testing.assert_close(there.factors(module).dense(), here.factors(module).dense())


def test_every_method_that_a_config_knows_has_its_function() -> None:
    assert FUNCTIONS.keys() == METHODS.keys()


WHOLE: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens", "model.norm"]},
    {"modules_to_save": ["embed_tokens", "lm_head"], "targets": "all-linear"},
    {"trainable_token_indices": [3, 5, 7], "targets": ["down_proj"]},
    {"targets": ["k_proj"]},
]


@pytest.fixture(params=["tiny_base", "untied_base"])
def whole_donors(request: pytest.FixtureRequest, tmp_path: Path, make_adapter: Callable[..., Path]) -> tuple[str, list[Path]]:
    """A base, and adapters of it that save layers whole, and one that does not."""
    base = str(request.getfixturevalue(request.param))
    kinds = enumerate(WHOLE)
    return base, [make_adapter(tmp_path / f"donor-{n}", base, seed=n, std=0.2, whole=0.2, **kind) for n, kind in kinds]


def changes_by_peft(base: str, folder: Path) -> dict[str, Tensor]:
    """What an adapter changes in each weight of the base, as PEFT itself merges it."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).merge_and_unload().state_dict()
    return {name: after[name] - weight for name, weight in before.items()}


def logits_with_changes(base: str, changes: dict[str, Tensor]) -> Tensor:
    """Of the base with a head of its own, and changes to all of its weights."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += changes[name]
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("method", ["exact", "concat", "fold"])
def test_layers_that_donors_save_whole_are_merged_as_the_dense_sum(
    method: str, tmp_path: Path, whole_donors: tuple[str, list[Path]]
) -> None:
    base, folders = whole_donors
    weights = (0.6, 0.3, -0.4, 0.5)
    merged = merged_by(base, [read_adapter(folder, base=base) for folder in folders], method, 16, weights)
    write_adapter(tmp_path / "mashup", merged.adapter, base=base)
    found = [changes_by_peft(base, folder) for folder in folders]
    total = {name: sum((w * one[name] for w, one in zip(weights, found, strict=True)), torch.zeros(())) for name in found[0]}
    expected = logits_with_changes(base, total)
    torch.testing.assert_close(logits_by_peft(base, tmp_path / "mashup"), expected, rtol=1e-3, atol=1e-3)
    factors_alone = [read_adapter(folder) for folder in folders]
    write_adapter(tmp_path / "alone", merged_by(base, factors_alone, method, 16, weights).adapter)
    assert (logits_by_peft(base, tmp_path / "alone") - expected).abs().max() > 0.1
    again = read_adapter(tmp_path / "mashup", base=base)
    for name, change in merged.adapter.whole.items():
        torch.testing.assert_close(again.whole[name], change, atol=1e-6, rtol=0)


def test_other_methods_merge_whole_layers_as_they_do_delta_weights(whole_donors: tuple[str, list[Path]]) -> None:
    base, folders = whole_donors
    donors, name = [read_adapter(folder, base=base) for folder in folders[:2]], "model.embed_tokens.weight"
    deltas = [donor.whole[name] for donor in donors]
    assert torch.equal(
        merged_by(base, donors, "ties", 4).adapter.whole[name], merge_utils.ties(deltas, torch.tensor([1.0, 1.0]), DENSITY)
    )
    dropped = merged_by(base, donors, "dare", 4).adapter.whole[name]
    assert 0.2 < float((dropped == 0).float().mean()) < 0.3  # half of each, at random
    alike = [donors[0], donors[0]]
    torch.testing.assert_close(merged_by(base, alike, "ab_mean", 4).adapter.whole[name], deltas[0])


def test_what_one_donor_adds_to_a_layer_that_another_replaces_is_added_there(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    folders = [
        make_adapter(tmp_path / "a", tiny_base, std=0.2, whole=0.1, modules_to_save=["down_proj"]),
        make_adapter(tmp_path / "b", tiny_base, std=0.2, targets="all-linear"),
    ]
    donors = [read_adapter(folder, base=tiny_base) for folder in folders]
    merged = merged_by(tiny_base, donors, "exact", 8, (0.6, 0.3))
    assert not merged.adapter.tensors.keys() & {name.rpartition(".")[0] for name in merged.adapter.whole}
    write_adapter(tmp_path / "mashup", merged.adapter, base=tiny_base)
    found = [changes_by_peft(tiny_base, folder) for folder in folders]
    total = {name: 0.6 * found[0][name] + 0.3 * found[1][name] for name in found[0]}
    expected = logits_with_changes(tiny_base, total)
    torch.testing.assert_close(logits_by_peft(tiny_base, tmp_path / "mashup"), expected, rtol=1e-3, atol=1e-3)


def test_donors_that_replace_what_the_others_adapt_leave_nothing_to_train(
    tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]
) -> None:
    pairs = (("q_proj", "v_proj"), ("v_proj", "q_proj"))
    folders = [make_adapter(tmp_path / one, tiny_base, whole=0.1, targets=[one], modules_to_save=[other]) for one, other in pairs]
    with pytest.raises(AdapterError, match="replaced whole by another, which leaves no factors to train"):
        merged_by(tiny_base, [read_adapter(folder, base=tiny_base) for folder in folders], "exact", 8)


def test_a_random_delta_has_random_whole_layers_of_the_same_norms(whole_donors: tuple[str, list[Path]]) -> None:
    base, folders = whole_donors
    adapter = read_adapter(folders[1], base=base)
    drawn = random_like(adapter, base, linear_shapes(base)[0])
    assert drawn.whole.keys() == adapter.whole.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    for name, change in adapter.whole.items():
        assert float(drawn.whole[name].norm()) == pytest.approx(float(change.norm()), rel=1e-4)
        assert not torch.allclose(drawn.whole[name], change)
