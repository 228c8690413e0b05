"""What past targets teach of a new one: who is chosen as a probe, what is foretold, and who may be left out."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.search.prediction import (
    AS_FORETOLD,
    ENOUGH,
    Errors,
    Prediction,
    choose_probes,
    components,
    judge_errors,
    next_probes,
    predict,
)

Floats = NDArray[np.float64]


def world(seed: int, adapters: int = 400, targets: int = 9, noise: float = 0.1) -> list[Floats]:
    """Losses of adapters on 4 samples of each target: adapters have skills, targets ask for some of them."""
    generator = np.random.default_rng(seed)
    skills = generator.standard_normal((adapters, 4))
    wanted = generator.dirichlet(np.full(4, 0.5), targets)
    return [(skills @ w)[:, None] + noise * generator.standard_normal((adapters, 4)) for w in wanted]


@pytest.mark.parametrize("seed", range(5))
def test_adapters_that_did_alike_on_past_targets_are_foretold_to_do_so_again(seed: int) -> None:
    *past, new = world(seed)
    parts = components(np.concatenate(past, axis=1))
    probes = choose_probes(parts, 24)
    foretold = predict(parts, probes, new[probes].mean(axis=1))
    truth = new.mean(axis=1)
    assert np.corrcoef(foretold.mean_N, truth)[0, 1] > 0.9
    z = (truth - foretold.mean_N) / foretold.std_N
    assert 0.3 < np.std(z) < 1.7  # its uncertainty is about what it says
    chosen = next_probes(foretold, probes, truth[probes], 8, 40)
    assert not set(chosen) & set(probes)
    expected = sorted(set(np.argsort(truth)[:10]) - set(probes))
    assert len(set(expected) & set(chosen)) >= 0.8 * len(expected)  # the best come first


def test_where_the_past_tells_nothing_nobody_is_without_a_chance() -> None:
    """The new target's losses have nothing to do with those of the past."""
    *past, new = world(0)
    truth = np.random.default_rng(1).permutation(new.mean(axis=1))
    parts = components(np.concatenate(past, axis=1))
    probes = choose_probes(parts, 24)
    foretold = predict(parts, probes, truth[probes])
    assert len(next_probes(foretold, probes, truth[probes], 8, 400)) > 300


def test_there_are_no_further_probes_where_nobody_may_be_among_the_best() -> None:
    foretold = Prediction(np.array([0.0, 0.1, 5.0, 5.0, 9.0]), np.full(5, 0.5))
    assert next_probes(foretold, np.array([0, 1]), np.array([0.0, 0.1]), 2, 9).tolist() == []
    assert next_probes(foretold, np.array([0, 2]), np.array([0.0, 5.0]), 2, 9).tolist() == [1, 3]
    assert next_probes(foretold, np.array([0, 2]), np.array([0.0, 5.0]), 2, 1).tolist() == [1]


def test_probes_are_different_adapters_unlike_each_other() -> None:
    twins = np.repeat(np.eye(5), 10, axis=0) + 1e-3 * np.random.default_rng(0).standard_normal((50, 5))
    probes = choose_probes(components(twins), 5)
    assert sorted(probes // 10) == [0, 1, 2, 3, 4]  # one of each kind
    every = choose_probes(components(twins), 80)
    assert sorted(every) == list(range(50))


def test_scores_that_are_missing_or_blew_up_do_not_decide() -> None:
    *past, new = world(3)
    matrix = np.concatenate(past, axis=1)
    gaps = np.random.default_rng(2).random(matrix.shape) < 0.1
    matrix[gaps] = np.nan
    matrix[7, :4] = 1e9
    parts = components(matrix)
    probes = choose_probes(parts, 24)
    losses = new[probes].mean(axis=1)
    losses[0] = 1e6
    foretold = predict(parts, probes, losses)
    assert np.isfinite(foretold.mean_N).all()
    assert np.corrcoef(foretold.mean_N, new.mean(axis=1))[0, 1] > 0.75


def test_alike_adapters_are_foretold_alike() -> None:
    parts = components(np.ones((20, 8)))
    foretold = predict(parts, choose_probes(parts, 4), np.zeros(4))
    assert np.ptp(foretold.mean_N) == pytest.approx(0)
    assert len(next_probes(foretold, np.arange(4), np.zeros(4), 8, 20)) == 16


def test_errors_that_are_as_foretold_change_nothing() -> None:
    errors = judge_errors(np.random.default_rng(0).standard_normal(400))
    assert errors.scale == pytest.approx(1.0, abs=0.1)
    assert errors.peaked < 0.3
    assert judge_errors(np.full(ENOUGH - 1, 9.0)) == AS_FORETOLD  # too few
    assert AS_FORETOLD.quantile(0.01) == pytest.approx(-2.326, abs=1e-3)


def test_errors_that_are_larger_or_heavier_tailed_than_foretold_let_more_in() -> None:
    generator = np.random.default_rng(0)
    large, heavy = judge_errors(2 * generator.standard_normal(400)), judge_errors(generator.standard_t(3, 400) / 3**0.5)
    assert large.scale == pytest.approx(2.0, rel=0.1)
    assert heavy.peaked > 1
    foretold = Prediction(np.append(np.zeros(8), np.linspace(1, 20, 40)), np.ones(48))
    let_in = [len(next_probes(foretold, np.arange(8), np.zeros(8), 8, 48, errors)) for errors in (AS_FORETOLD, large, heavy)]
    assert let_in[0] < let_in[2]
    assert let_in[0] < let_in[1]


def test_the_quantile_is_that_of_heavy_tails() -> None:
    """As of draws of Student's t with 10 degrees of freedom, whose excess kurtosis is 1."""
    draws = np.random.default_rng(0).standard_t(10, 10**6) * (8 / 10) ** 0.5
    assert Errors(1.0, 1.0).quantile(0.003) == pytest.approx(np.quantile(draws, 0.003), rel=0.1)


def test_equal_errors_have_no_tails() -> None:
    assert judge_errors(np.full(50, 0.5)) == AS_FORETOLD
