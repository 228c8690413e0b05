"""The arithmetic of a plan, on made races, rates and ledgers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster.resources import Resources
from pipeline.config import TrainConfig
from pipeline.plan.costs import (
    Scoring,
    Training,
    against,
    arm_tokens,
    hours,
    left_to_score,
    loads_at_most,
    measuring_seconds,
    scoring_seconds,
    total,
    training_rates,
    training_seconds,
)
from pipeline.search.race import Race, make_schedule
from pipeline.train.batches import row_numbers

N_SEARCH, N_HOLDOUT = 24, 8
S = N_SEARCH + N_HOLDOUT
RATES = {"start_seconds": 10.0, "tokens_per_second": 50.0, "evaluation_tokens_per_second": 200.0}


def new_race(n: int, share: float | None, nll_NS: Any = None) -> Race:
    unknown = np.full((n, S), np.nan, np.float32)
    return Race(make_schedule(n, N_SEARCH, N_HOLDOUT, share), [3] * S, unknown if nll_NS is None else nll_NS)


def run_through(race: Race, truth_NS: Any) -> int:
    """Score whatever the race asks for. Gives how many adapter-samples that were."""
    return sum(jobs_of(race, truth_NS))


def jobs_of(race: Race, truth_NS: Any) -> list[int]:
    """Score whatever the race asks for, one candidate a time. Gives the samples of each time."""
    jobs = []
    while not race.over:
        (candidate,), samples = race.take(1)
        race.report(candidate, samples, truth_NS[candidate, samples])
        jobs.append(len(samples))
    return jobs


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 150), share=st.sampled_from([0.02, 0.1, 0.4, 1.0, None]), known=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_race_never_asks_for_more_than_was_said(n: int, share: float | None, known: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth_NS = generator.gamma(2, 1, (n, S)).astype(np.float32)
    race = new_race(n, share, np.where(generator.random((n, S)) < known, truth_NS, np.nan).astype(np.float32))
    said, loads = left_to_score(race), loads_at_most(race)
    assert said <= n * S
    jobs = jobs_of(race, truth_NS)
    assert sum(jobs) <= said
    assert left_to_score(race) == loads_at_most(race) == 0
    if not known:  # else some that are asked for are in the store
        assert len(jobs) - 1 <= loads  # the base is no adapter


def test_an_adapter_is_read_once_for_a_pool_that_is_scored_in_one_go() -> None:
    assert loads_at_most(new_race(8, 0.1)) == 7  # the base is none
    known = np.zeros((8, S), np.float32)
    known[2, 5] = known[3, :] = np.nan
    assert loads_at_most(new_race(8, 0.1, known)) == 2


def test_small_pools_are_scored_in_full_and_large_ones_within_the_budget() -> None:
    assert left_to_score(new_race(8, 0.1)) == 8 * S
    assert left_to_score(new_race(1000, 0.1)) == pytest.approx(0.1 * 1000 * S)
    assert left_to_score(new_race(1000, None)) == 1000 * S


def test_what_a_finished_race_knew_is_not_asked_for_again() -> None:
    truth_NS = np.random.default_rng(0).gamma(2, 1, (200, S)).astype(np.float32)
    first = new_race(200, 0.1)
    assert run_through(first, truth_NS) < 200 * S
    assert left_to_score(new_race(200, 0.1, first.nll_NS)) == 0


def test_scoring_is_the_start_and_the_tokens_shared_by_the_engines() -> None:
    assert scoring_seconds(Scoring(4000, engines=2), RATES) == 10 + 4000 / 100
    assert scoring_seconds(Scoring(4000, engines=2, limit=15), RATES) == 10 + 15
    assert scoring_seconds(Scoring(0, engines=2), RATES) == 0
    assert scoring_seconds(Scoring(4000, engines=2), {}) is None
    assert scoring_seconds(Scoring(4000, engines=2), {"start_seconds": 10.0}) is None


def test_adapters_are_read_while_others_are_scored() -> None:
    rates = RATES | {"load_seconds_per_byte": 0.01}
    assert scoring_seconds(Scoring(4000, engines=2, load_bytes=6000.0), rates) == 10 + 80 / 2
    assert scoring_seconds(Scoring(4000, engines=2, load_bytes=9000.0), rates) == 10 + 90 / 2
    assert scoring_seconds(Scoring(4000, engines=2, load_bytes=6000.0), RATES) == 10 + 40
    assert scoring_seconds(Scoring(4000, engines=2, limit=15, load_bytes=6000.0), rates) == 10 + 15


def test_engines_that_are_up_already_do_not_start() -> None:
    assert scoring_seconds(Scoring(100, engines=1), {"tokens_per_second": 50.0}) == 2


def test_arms_train_side_by_side_and_are_tested_at_the_end() -> None:
    work = Training(arms=5, at_once=2, tokens=1000, evaluation_tokens=400, test_tokens=600)
    assert training_seconds(work, RATES) == 3 * (10 + 20 + 2) + 3
    assert training_seconds(work, {}) is None
    assert training_seconds(Training(0, 0, 1000, 400, 0), {}) == 0


def test_a_metric_is_measured_on_each_row_for_each_arm_that_is_tested() -> None:
    work = Training(arms=5, at_once=2, tokens=1000, evaluation_tokens=400, test_tokens=600, tested=2, metric_rows=50)
    assert measuring_seconds(work, {"seconds_per_row": 0.25}) == 25
    assert measuring_seconds(work, {}) == 0


@pytest.mark.parametrize(("at_once", "starts", "arms"), [(2, 1, 1), (1, 3, 4 / 3)])
def test_a_hedge_is_a_third_longer_where_its_arms_have_no_place_beside_each_other(at_once: int, starts: int, arms: float) -> None:
    work = Training(arms=2, at_once=at_once, tokens=1000, evaluation_tokens=400, test_tokens=600, decided_after=1 / 3)
    assert training_seconds(work, RATES) == pytest.approx(starts * 10 + arms * (20 + 2) + 3)
    assert work.arms_worth == pytest.approx(4 / 3)


def test_the_tokens_of_an_arm_are_those_of_its_batches_padded_by_each_worker() -> None:
    lengths = np.array([5, 9, 2, 7, 3])
    train = TrainConfig(steps=4, batch_size=3, workers=2)
    batches = [sorted(lengths[row_numbers(step, step + 1, 3, 5, 1)]) for step in range(4)]
    assert arm_tokens(lengths, train, seed=1, tokens=100) == sum(2 * batch[2] + batch[1] for batch in batches)
    assert arm_tokens(lengths, train, seed=1, tokens=1) == sum(sum(batch) for batch in batches)


def outcome(**changes: Any) -> dict[str, Any]:
    points = [(0, 0.0), (100, 4.0), (300, 6.0)]
    curve = [{"tokens": tokens, "seconds": seconds} for tokens, seconds in points]
    return {"curve": curve, "evaluation_seconds": 3.0, "fit_seconds": 20.0, "diverged_at": None} | changes


def test_an_arm_measures_its_start_its_steps_and_its_evaluations() -> None:
    """The steps before the first evaluation warm up; three evaluations took a second each."""
    measured = {"tokens_per_second": 100.0, "evaluation_tokens_per_second": 50.0, "start_seconds": 11.0}
    assert training_rates(outcome(), evaluation_tokens=50) == measured
    assert training_rates(outcome(tokens_per_pass=[8192, 4096]), 50) == measured | {"tokens_per_pass": 4096.0}
    assert training_rates(outcome(diverged_at=2), 50) == {}
    assert training_rates(outcome(held_seconds=4.0), 50) == measured | {"start_seconds": 7.0}  # in which it waited in a hedge
    assert training_rates(outcome(stopped_at=2), 50) == {}
    assert training_rates(outcome(fit_seconds=8.0), 50) == {}  # its curve began in an earlier attempt


def test_hours_count_what_runs_side_by_side() -> None:
    assert hours(1800, Resources(1.0, 2, 8), 3) == {"gpu_hours": 3.0, "thread_hours": 12.0}
    assert hours(1800, Resources(1.0, 0, 2), 1) == {"gpu_hours": 0.0, "thread_hours": 1.0}
    assert hours(None, Resources(1.0, 0, 2), 1) == {"gpu_hours": None, "thread_hours": None}
    assert (total([1.0, 2.0]), total([1.0, None])) == (3.0, None)


def test_what_was_spent_before_the_plan_is_not_set_against_it() -> None:
    def record(key: str, seconds: float, **details: int) -> dict[str, Any]:
        return {"key": key, "seconds": seconds, "details": details}

    plan = {
        "ledger": {"search": record("a", 5.0, adapter_samples=40), "merge": record("old", 9.0)},
        "stages": {"search": {"seconds": 10.0}, "merge": {"seconds": None}, "compare": {"seconds": 0.0}},
        "total": {"seconds": None},
        "adapter_samples": {"at_most": 200},
    }
    now = {"search": record("a", 20.0, adapter_samples=140), "merge": record("new", 7.0), "compare": record("c", 1.0)}
    found = against(plan, now)
    assert found["seconds"]["search"] == {"estimated": 10.0, "true": 15.0, "ratio": 1.5}
    assert found["seconds"]["merge"] == {"estimated": None, "true": 7.0, "ratio": None}
    assert found["seconds"]["compare"] == {"estimated": 0.0, "true": 1.0, "ratio": None}
    assert found["seconds"]["total"] == {"estimated": None, "true": 23.0, "ratio": None}
    assert found["adapter_samples"] == {"estimated": 200, "true": 100, "ratio": 0.5}
