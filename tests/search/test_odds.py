"""Who may still be among the best: by what samples tell candidates apart, and how noisy they are."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.search.odds import estimate_skills, may_be_best, sample_scales

Floats = NDArray[np.float64]


def differences(seed: int, candidates: int = 300, samples: int = 8, noise: float = 0.4) -> tuple[Floats, Floats]:
    """Skills, and differences on samples of which each tells candidates apart to a degree of its own."""
    generator = np.random.default_rng(seed)
    skill_M = generator.normal(0, 0.7, candidates)
    scale_S = generator.uniform(0.2, 1.8, samples)
    asked_S = generator.normal(0, 1, samples)
    return skill_M, asked_S + np.outer(skill_M, scale_S) + noise * generator.standard_normal((candidates, samples))


def test_a_sample_counts_by_how_far_it_tells_candidates_apart() -> None:
    skill_M = np.linspace(-1, 1, 200)
    found = np.outer(skill_M, [0.5, 1.0, 1.5]) + 0.01 * np.random.default_rng(0).standard_normal((200, 3))
    assert sample_scales(found) == pytest.approx([0.5, 1.0, 1.5], rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_skills_are_closer_to_the_truth_than_plain_means(seed: int) -> None:
    skill_M, found_MS = differences(seed)
    estimated = estimate_skills(found_MS).mean_M
    plain = found_MS.mean(axis=1)
    truth = skill_M - skill_M.mean()

    def error(values: Floats) -> float:  # in whatever units
        return float(1 - np.corrcoef(values, truth)[0, 1])

    assert error(estimated) < error(plain)


@pytest.mark.parametrize("seed", range(5))
def test_the_uncertainty_of_a_skill_is_about_what_it_says(seed: int) -> None:
    skill_M, found_MS = differences(seed)
    mean_M, variance_M = estimate_skills(found_MS)
    slope, start = np.polyfit(skill_M, found_MS.mean(axis=1), 1)  # the estimates' units
    z_M = (slope * skill_M + start - found_MS.mean() - mean_M) / np.sqrt(variance_M)
    assert 0.7 < np.std(z_M) < 1.4


@pytest.mark.parametrize("risk", [0.01, 0.05, 0.5])
def test_the_best_are_lost_about_as_seldom_as_the_risk_says(risk: float) -> None:
    lost, stayed = 0, 0
    for seed in range(60):
        skill_M, found_MS = differences(seed)
        stays_M = may_be_best(found_MS, 3, risk)
        lost += int((~stays_M[np.argsort(skill_M)[:3]]).sum())
        stayed += int(stays_M.sum())
    assert lost <= 3 * 60 * risk
    assert stayed < 0.6 * 60 * 300


def test_the_fewer_samples_and_the_smaller_the_risk_the_more_go_on() -> None:
    _, found_MS = differences(1, samples=16)
    go_on = [int(may_be_best(found_MS[:, :n], 3, risk).sum()) for n, risk in ((2, 0.05), (16, 0.05), (16, 0.5))]
    assert go_on == sorted(go_on, reverse=True)
    assert go_on[0] > go_on[-1]


def test_one_candidate_that_blew_up_changes_nothing_for_the_others() -> None:
    _, found_MS = differences(2)
    wild_MS = found_MS.copy()
    worst = int(np.argmax(found_MS.mean(axis=1)))
    wild_MS[worst] = 1e6
    others = np.arange(len(found_MS)) != worst
    assert not may_be_best(wild_MS, 3, 0.05)[worst]
    assert (may_be_best(wild_MS, 3, 0.05)[others] == may_be_best(found_MS, 3, 0.05)[others]).mean() > 0.97


def test_equal_candidates_all_go_on() -> None:
    assert may_be_best(np.zeros((20, 4)), 3, 0.05).all()
