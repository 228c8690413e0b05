"""Means per token and their errors against simulation and hand-made cases; parity on hand-made curves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.stats import best_init, interpolate, mean_per_token, steps_to_parity, wilson_interval


def test_mean_per_token_weighs_samples_by_their_tokens() -> None:
    assert mean_per_token(np.array([1.0, 9.0]), np.array([1.0, 3.0])).mean == 2.5


def test_error_is_that_of_a_mean_where_all_samples_are_of_one_length() -> None:
    values = np.array([1.0, 4.0, 2.0, 7.0, 3.0])
    estimate = mean_per_token(values * 6, np.full(5, 6.0))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_error_agrees_with_the_spread_over_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        tokens = generator.integers(5, 50, size=60).astype(float)
        estimate = mean_per_token(generator.gamma(2.0, 0.5, size=60) * tokens, tokens)
        means.append(estimate.mean)
        errors.append(estimate.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)


def test_a_single_sample_has_no_error() -> None:
    estimate = mean_per_token(np.array([6.0]), np.array([3.0]))
    assert estimate.mean == 2.0
    assert math.isnan(estimate.stderr)


STEPS = [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 2.5, 15.0),
        ([4.0, 3.0, 2.0, 1.0], 3.0, 10.0),
        ([2.0, 3.0, 2.0, 1.0], 2.5, 0.0),
        ([4.0, 3.0, 3.5, 1.0], 3.2, 8.0),
        ([4.0, 3.0, 2.0, 1.0], 0.5, None),
        ([math.inf, 3.0, 2.0, 1.0], 3.5, 10.0),
        ([math.inf] * 4, 1.0, None),
        ([math.nan, 3.0, 2.0, 1.0], 2.0, 20.0),
        ([], 1.0, None),
    ],
    ids=["between", "exactly", "start", "first time", "never", "after an infinite loss", "all infinite", "after NaN", "empty"],
)
def test_steps_to_parity(losses: list[float], target: float, expected: float | None) -> None:
    assert steps_to_parity(STEPS[: len(losses)], losses, target) == pytest.approx(expected)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12), st.floats(0.1, 10))
def test_the_curve_has_the_target_value_at_parity_and_lies_above_it_before(losses: list[float], target: float) -> None:
    steps = list(range(0, 10 * len(losses), 10))
    found = steps_to_parity(steps, losses, target)
    if found is None:
        assert min(losses) > target
        return
    assert found == 0 or interpolate(steps, losses, found) == pytest.approx(target)
    assert all(loss > target for step, loss in zip(steps, losses, strict=True) if step < found - 1e-9)


def test_interpolation_is_linear_between_evaluations() -> None:
    assert interpolate([0, 10], [4.0, 2.0], 2.5) == 3.5


def test_the_start_that_is_kept_is_the_one_of_the_lowest_validation_loss() -> None:
    inits = {name: {"validation_nll_best": nll} for name, nll in {"base": 1.5, "mashup": 1.25, "paper": 1.25}.items()}
    assert best_init(inits) == "mashup"


def test_the_interval_of_a_share_is_wilsons() -> None:
    """As statsmodels' proportion_confint(..., method="wilson") gives it."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson_interval(12, 12)
    assert (round(low, 3), high) == (0.757, pytest.approx(1.0))
    assert wilson_interval(0, 12)[0] == 0.0
