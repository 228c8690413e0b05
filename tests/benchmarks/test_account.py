"""What the arms of a task come to, by our accounting and by the paper's."""

import pytest
from study_rows import absent, arm, mashup

from benchmarks.account import Task, account, parity_by_accuracy
from benchmarks.study_arms import StudyArm


def accounted(*arms: StudyArm) -> Task:
    found = account(arms)
    assert found is not None
    return found


def test_ours_charges_all_overhead_and_takes_the_mean_curve_of_the_seeds() -> None:
    later = {"seed": 1, "validation_nll": (3.0, 1.0, 0.8), "test_exact_match": 0.6}
    task = accounted(arm(), arm(seed=1), mashup(), mashup(**later))
    found = task.starts["mashup"]
    # the mean curve 2.5, 1.0, 0.85 is at the base's end, 1.0, after 10 of 20 steps, which take 50 s and 50 s of overhead
    assert found.parity == pytest.approx(0.5)
    assert found.seconds_saved == pytest.approx(1 - (50 + 50) / 100)
    assert (found.exact_match, found.exact_match_spread) == pytest.approx((0.65, 0.0707), abs=1e-4)
    assert not task.worse


def test_without_parity_the_overhead_is_lost() -> None:
    found = accounted(arm(), mashup(validation_nll=(2.0, 1.5, 1.2))).starts["mashup"]
    assert (found.parity, found.seconds_saved) == (None, -0.5)


def test_starts_without_donors_pay_for_themselves_alone() -> None:
    found = accounted(arm(), mashup(init="eva", start_seconds=5.0)).starts["eva"]
    assert found.seconds_saved == pytest.approx(1 - (50 + 5) / 100)


def test_the_mashup_of_a_base_verdict_is_the_base() -> None:
    task = accounted(arm(verdict="base"), absent("mashup", verdict="base"))
    assert task.of("mashup") == task.starts["base"]
    assert "mashup" not in task.starts


def test_what_is_less_than_the_base_beyond_noise_is_said() -> None:
    assert accounted(arm(), mashup(test_exact_match=0.3)).worse
    assert not accounted(arm(), mashup(test_exact_match=0.45)).worse


def test_a_task_without_an_arm_from_the_base_says_nothing() -> None:
    assert account([mashup(), absent("paper")]) is None


@pytest.mark.parametrize(
    ("accuracy", "share"), [((0.6, 0.7, 0.8), 0.0), ((0.2, 0.4, 0.8), 0.75), ((0.2, 0.3, 0.59), 1.0), ((0.2, 0.6, 0.1), 0.5)]
)
def test_parity_by_accuracy_is_interpolated_and_never_is_all_of_the_training(accuracy: tuple[float, ...], share: float) -> None:
    assert parity_by_accuracy((0.0, 10.0, 20.0), accuracy, 0.6) == pytest.approx(share)


def test_the_papers_accounting_picks_rates_by_final_accuracy_and_charges_one_donor() -> None:
    """The base's better rate by accuracy is not the one that our validation chose, and ends at 0.9."""
    better = {"lr": 1e-3, "validation_token_accuracy": (0.1, 0.5, 0.9), "seconds": (0.0, 40.0, 80.0)}
    untested = {"test_nll": None, "test_token_accuracy": None, "test_exact_match": None}
    task = accounted(arm(), arm(**better, **untested), mashup(init="paper", validation_token_accuracy=(0.5, 0.9, 0.95)))
    base, found = task.by_paper["base"], task.by_paper["paper"]
    assert (base.accuracy, base.parity, base.time) == (0.9, 1.0, 1.0)
    assert (found.accuracy, found.parity) == (0.95, 0.5)
    assert found.time == pytest.approx((10 + 0.5 * 100) / 80)
    assert found.time_all == pytest.approx((50 + 0.5 * 100) / 80)


def test_a_time_that_was_not_measured_is_not_made_up() -> None:
    found = accounted(arm(), mashup(charged_seconds=None)).by_paper["mashup"]
    assert found.time is None
    assert found.time_all > 0
