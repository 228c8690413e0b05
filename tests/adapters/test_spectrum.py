"""Figures of a spectrum against dense SVDs, sketches against dense inner products, and who is told apart by them."""

import numpy as np
import pytest
import torch

from pipeline.adapters.adapter import Adapter, from_factors
from pipeline.adapters.low_rank import Factors
from pipeline.adapters.spectrum import FEWEST, FIGURES, NEAR_DIRECTION, families, outliers, sketch, spectrum
from pipeline.model.base_model import linear_shapes

SALT = 7

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def drawn(base: str, seed: int, rank: int = 4, size: float = 1.0) -> Adapter:
    shapes, _ = linear_shapes(base)
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        name: Factors(
            size * torch.randn(rank, shapes[name][1], generator=generator),
            torch.randn(shapes[name][0], rank, generator=generator),
        )
        for name in MODULES
    }
    return from_factors(base, deltas, rank, 2 * rank, shapes, seed)


def other_factors(adapter: Adapter) -> Adapter:
    """The same delta weights: A and B are multiplied by a matrix and its inverse."""
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0] * 3
    return Adapter(adapter.config, {m: (mix @ a_RI, b_OR @ mix.inverse()) for m, (a_RI, b_OR) in adapter.tensors.items()})


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(adapter.config, {m: (a_RI, factor * b_OR) for m, (a_RI, b_OR) in adapter.tensors.items()})


def rounded(adapter: Adapter) -> Adapter:
    return Adapter(adapter.config, {m: (a.bfloat16().float(), b.bfloat16().float()) for m, (a, b) in adapter.tensors.items()})


def test_figures_are_those_of_the_dense_singular_values(tiny_base: str) -> None:
    adapter = drawn(tiny_base, 0)
    expected, norms = [], []
    for module in MODULES:
        values = torch.linalg.svdvals(adapter.factors(module).dense().double())[:4].numpy()
        share = values**2 / (values**2).sum()
        centred = values - values.mean()
        kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
        entropy = -(share * np.log(share)).sum() / np.log(4)
        norms.append(np.log((values**2).sum()) / 2)
        expected.append([np.log(values[0]), np.log((values**2).sum()) / 2, share[0], entropy, kurtosis])
    assert len(FIGURES) == 6
    assert spectrum(adapter) == pytest.approx([*np.mean(expected, axis=0), max(norms) - min(norms)], rel=1e-4)


def test_a_zero_adapter_has_figures_too(tiny_base: str) -> None:
    zero = scaled(drawn(tiny_base, 0), 0.0)
    assert spectrum(zero) == [0.0] * 6
    assert not any(sketch(zero, SALT))


def test_families_are_told_by_their_delta_weights_alone(tiny_base: str) -> None:
    """Other factors, another size, rounding: one family. Another seed, the opposite, zero: others."""
    one = drawn(tiny_base, 1)
    pool = [drawn(tiny_base, 0), one, other_factors(one), scaled(one, 0.3), rounded(one), scaled(one, -1.0), scaled(one, 0.0)]
    first, sizes = families(np.array([sketch(adapter, SALT) for adapter in pool]))
    assert first == [0, 1, 1, 1, 1, 5, 6]
    assert sizes == pytest.approx([1, 1, 1, 0.3, 1, 1, 1], rel=1e-2)


def test_an_adapter_that_is_far_from_the_pool_is_an_outlier(tiny_base: str) -> None:
    pool = [drawn(tiny_base, seed) for seed in range(FEWEST)]
    peaked = drawn(tiny_base, 99)
    spiked = {m: (a_RI * torch.tensor([[30.0], [1], [1], [1]]), b_OR) for m, (a_RI, b_OR) in peaked.tensors.items()}
    figures = np.array([spectrum(adapter) for adapter in [*pool, Adapter(peaked.config, spiked)]])
    assert outliers(figures[:-1]) == {}
    found = outliers(figures)
    assert found.keys() == {FEWEST}
    assert "unusual weights" in found[FEWEST]
    assert outliers(figures[-3:]) == {}  # too few to say what is usual


def test_near_copies_are_of_one_family_where_that_is_asked(tiny_base: str) -> None:
    """A donor, the same with eight per cent of noise, and another one."""
    one = drawn(tiny_base, 1)
    noise = {m: (a_RI + 0.08 * a_RI.std() * torch.randn_like(a_RI), b_OR) for m, (a_RI, b_OR) in one.tensors.items()}
    pool = [one, Adapter(one.config, noise), drawn(tiny_base, 2)]
    sketches = np.array([sketch(adapter, SALT) for adapter in pool])
    assert families(sketches, NEAR_DIRECTION)[0] == [0, 0, 2]
    assert families(sketches)[0] == [0, 1, 2]


def test_a_sketch_cannot_be_forged_by_who_does_not_know_the_salt(tiny_base: str) -> None:
    """Two adapters that have the same sketch under one salt have others under the next."""
    target, forger = (sketch(drawn(tiny_base, seed), SALT) for seed in (0, 1))
    shapes, _ = linear_shapes(tiny_base)
    module = MODULES[0]
    unit = []
    for row in range(len(target)):  # what each row of a wide factor adds to the sketch
        a_RI, b_OR = torch.zeros(16, shapes[module][1]), torch.zeros(shapes[module][0], 16)
        a_RI[row, row], b_OR[row, row] = 1.0, 1.0
        unit.append(sketch(from_factors(tiny_base, {module: Factors(a_RI, b_OR)}, 16, 16, shapes, 0), SALT))
    parts = np.linalg.solve(np.array(unit).T, np.array(target) - np.array(forger))
    a_RI, b_OR = torch.zeros(16, shapes[module][1]), torch.zeros(shapes[module][0], 16)
    for row, part in enumerate(parts):
        a_RI[row, row], b_OR[row, row] = 1.0, float(part)
    added = from_factors(tiny_base, {module: Factors(a_RI, b_OR)}, 16, 16, shapes, 0)

    def total(salt: int) -> np.ndarray:
        return np.array(sketch(drawn(tiny_base, 1), salt)) + np.array(sketch(added, salt))

    same, other = SALT, SALT + 1
    assert total(same) == pytest.approx(np.array(target), rel=1e-3)
    assert np.abs(total(other) - np.array(sketch(drawn(tiny_base, 0), other))).max() > 0.1 * np.abs(total(other)).max()


def test_one_module_that_is_blown_up_is_an_outlier(tiny_base: str) -> None:
    pool = [drawn(tiny_base, seed) for seed in range(FEWEST)]
    blown = dict(drawn(tiny_base, 99).tensors)
    blown[MODULES[0]] = (blown[MODULES[0]][0] * 1e4, blown[MODULES[0]][1])
    blown[MODULES[1]] = (blown[MODULES[1]][0] * 1e-4, blown[MODULES[1]][1])  # so that no mean over modules shows it
    figures = np.array([spectrum(adapter) for adapter in [*pool, Adapter(pool[0].config, blown)]])
    assert "largest module" in outliers(figures)[FEWEST]
