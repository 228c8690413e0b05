"""What tasks say together."""

import numpy as np
import pytest

from benchmarks.over_tasks import bootstrap_interval, detectable, over_tasks, sign_flips


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1.0] * 5, 2 / 32), ([1.0, 2.0, 3.0], 2 / 8), ([0.0, 0.0], 1.0), ([5.0, -5.0], 1.0), ([3.0, 1.0, -1.0], 6 / 8)],
)
def test_sign_flips_are_counted_exactly(differences: list[float], p: float) -> None:
    assert sign_flips(differences) == pytest.approx(p)


def test_sign_flips_of_many_tasks_are_drawn() -> None:
    assert sign_flips([1.0] * 20) < 0.001
    assert sign_flips([(-1.0) ** n for n in range(20)]) == 1.0


def test_the_interval_is_that_of_a_normal_mean_where_there_are_many_tasks() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_what_can_be_detected_falls_with_more_tasks_and_grows_with_their_spread() -> None:
    """Of a normal spread of 1 a paired t-test of 12 tasks finds 0.89 with a power of 0.8."""
    few, many = ([(-1.0) ** n * (1 + n % 3) / 2 for n in range(tasks)] for tasks in (12, 48))
    spread = np.std(few, ddof=1)
    found = detectable(few)
    assert found is not None
    assert found == pytest.approx(0.89 * spread, rel=0.15)
    assert (detectable(many) or 9) < 0.6 * found
    assert detectable([10 * value for value in few]) == pytest.approx(10 * found, rel=0.01)


def test_with_five_tasks_nothing_can_be_detected() -> None:
    means = over_tasks([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (means.mean, means.tasks, means.detectable) == (3.0, 5, None)
    assert means.low < 3 < means.high
