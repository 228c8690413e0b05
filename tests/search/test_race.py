"""The rules of the race: who goes on depends on the scores alone, the budget holds, the best are never lost without noise."""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.search.race import (
    BASE,
    FIRST_RUNG,
    KEEP,
    SMALL_POOL,
    Floats,
    Race,
    Schedule,
    fair_batch,
    finalists,
    make_schedule,
    surely_above,
)

N_SEARCH, N_HOLDOUT = 24, 8
S = N_SEARCH + N_HOLDOUT


def losses(seed: int, n: int, noise: float = 1.0) -> tuple[Floats, list[int]]:
    """NLL sums of n candidates: a skill each, a difficulty a sample, noise for each pair."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 20, S)
    mean = 2 + generator.normal(0, 0.5, (n, 1)) + generator.gamma(2, 0.5, (1, S)) + noise * generator.normal(0, 0.3, (n, S))
    return (mean * tokens).astype(np.float32), tokens.tolist()


def empty(nll: Floats) -> Floats:
    return np.full_like(nll, np.nan)


def finish(
    race: Race, nll: Floats, order: np.random.Generator | None = None, workers: int = 1, count: int = 4
) -> Counter[tuple[int, int]]:
    """Run a race to its end with so many workers that report in any order. Counts how often each pair was scored."""
    scored: Counter[tuple[int, int]] = Counter()
    held: list[tuple[int, list[int]]] = []
    while not race.over:
        while len(held) < workers:
            candidates, samples = race.take(count)
            if not candidates:
                break
            scored.update((c, int(s)) for c in candidates for s in samples)
            held += [(c, samples.tolist()) for c in candidates]
        assert held, "nobody works and nothing can be taken, but the race is not over"
        candidate, samples_of = held.pop(int(order.integers(len(held))) if order else 0)
        race.report(candidate, np.array(samples_of), nll[candidate, samples_of])
    for candidate, samples_of in held:
        race.report(candidate, np.array(samples_of), nll[candidate, samples_of])
    return scored


def best(nll: Floats, tokens: list[int], count: int) -> set[int]:
    means = nll[1:, :N_SEARCH].sum(axis=1) / sum(tokens[:N_SEARCH])
    return set((np.argsort(means, kind="stable")[:count] + 1).tolist())


@given(n=st.integers(2, 200), share=st.floats(0.02, 1), n_search=st.integers(5, 200), n_holdout=st.integers(1, 80))
def test_a_plan_rises_to_every_sample(n: int, share: float, n_search: int, n_holdout: int) -> None:
    schedule = make_schedule(n, n_search, n_holdout, share)
    assert schedule.rungs == tuple(sorted(set(schedule.rungs)))
    assert schedule.rungs[-1] == n_search + n_holdout
    if n <= SMALL_POOL * finalists(n) or share == 1:
        assert len(schedule.rungs) == 1
    else:
        assert 2 <= schedule.rungs[0] <= FIRST_RUNG
        assert schedule.rungs[-2] == n_search
        assert schedule.budget is not None
        assert schedule.budget >= share * n * (n_search + n_holdout) * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 120), share=st.floats(0.03, 1), workers=st.integers(1, 40))
def test_the_result_does_not_depend_on_workers_or_on_the_order_of_scores(seed: int, n: int, share: float, workers: int) -> None:
    nll, tokens = losses(seed, n)
    schedule = make_schedule(n, N_SEARCH, N_HOLDOUT, share)
    one, many = Race(schedule, tokens, empty(nll)), Race(schedule, tokens, empty(nll))
    finish(one, nll)
    scored = finish(many, nll, np.random.default_rng(seed), workers)
    assert one.seen_N().tolist() == many.seen_N().tolist()
    assert max(scored.values()) == 1
    assert many.seen_N()[BASE] == S


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(17, 150), share=st.floats(0.03, 0.9))
def test_the_budget_holds(seed: int, n: int, share: float) -> None:
    nll, tokens = losses(seed, n)
    schedule = make_schedule(n, N_SEARCH, N_HOLDOUT, share)
    scored = finish(Race(schedule, tokens, empty(nll)), nll)
    assert schedule.budget is not None
    assert len(scored) <= max(schedule.budget, n * schedule.rungs[0] + (finalists(n) + 1) * S)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 400))
def test_a_race_that_is_taken_up_again_ends_alike_and_scores_nothing_twice(seed: int, cut: int) -> None:
    nll, tokens = losses(seed, 60)
    schedule = make_schedule(60, N_SEARCH, N_HOLDOUT, 0.3)
    whole = Race(schedule, tokens, empty(nll))
    first = Race(schedule, tokens, empty(nll))
    kept: Counter[tuple[int, int]] = Counter()
    for _ in range(cut):
        candidates, samples = first.take(1)
        if not candidates:
            break
        kept.update((candidates[0], int(s)) for s in samples)
        first.report(candidates[0], samples, nll[candidates[0], samples])
    second = Race(schedule, tokens, first.nll_NS.copy())
    again = finish(second, nll)
    assert finish(whole, nll).keys() == (kept + again).keys()
    assert not kept.keys() & again.keys()
    assert second.seen_N().tolist() == whole.seen_N().tolist()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.9))
def test_without_noise_the_best_go_through_to_the_end(seed: int, share: float) -> None:
    nll, tokens = losses(seed, 80, noise=0)
    race = Race(make_schedule(80, N_SEARCH, N_HOLDOUT, share), tokens, empty(nll))
    finish(race, nll)
    assert best(nll, tokens, KEEP) <= set(np.flatnonzero(race.seen_N() == S).tolist())


def test_a_race_by_confidence_drops_who_is_out_and_keeps_who_is_merely_unlucky() -> None:
    nll, tokens = losses(0, 100)
    sharp, kind = (Race(make_schedule(100, N_SEARCH, N_HOLDOUT, None, level), tokens, empty(nll)) for level in (0.8, 0.9999))
    few, many = finish(sharp, nll), finish(kind, nll)
    assert len(few) < len(many) < 100 * S
    assert best(nll, tokens, KEEP) <= set(np.flatnonzero(kind.seen_N() == S).tolist())


def test_everything_is_scored_where_the_budget_is_whole_or_the_pool_small() -> None:
    nll, tokens = losses(1, 40)
    assert len(finish(Race(make_schedule(40, N_SEARCH, N_HOLDOUT, 1), tokens, empty(nll)), nll)) == 40 * S
    assert len(finish(Race(make_schedule(10, N_SEARCH, N_HOLDOUT, 0.1), tokens, empty(nll[:10])), nll)) == 10 * S


def test_a_worker_gets_work_of_the_next_rung_while_another_is_slow() -> None:
    """One candidate's scores are missing; those that go on whatever these are may start."""
    nll, tokens = losses(2, 60)
    race = Race(make_schedule(60, N_SEARCH, N_HOLDOUT, 0.5), tokens, empty(nll))
    slow = race.take(1)[0]
    for _ in range(59):
        (candidate,), samples = race.take(1)
        race.report(candidate, samples, nll[candidate, samples])
    assert (race.rung, race.outstanding) == (0, 1)
    ahead, samples = race.take(4)
    assert samples.tolist() == [4, 5, 6, 7]
    race.report(slow[0], np.arange(4), nll[slow[0], :4])
    assert race.rung == 1
    assert set(ahead) <= set(race.survivors().tolist()) | set(ahead)
    assert not set(race.take(60)[0]) & set(ahead)  # they are with a worker


def drops() -> Iterator[Race]:
    nll, tokens = losses(3, 30)
    yield Race(make_schedule(30, N_SEARCH, N_HOLDOUT, 0.5), tokens, empty(nll))


def test_work_that_came_to_nothing_is_given_out_before_other_work() -> None:
    race = next(drops())
    first, _ = race.take(3)
    second, _ = race.take(3)
    race.give_back(first)
    race.give_back([29])  # was never taken
    assert race.take(3)[0] == first
    assert second == [3, 4, 5]


def test_those_that_are_preferred_are_taken_in_place_of_others_and_nobody_else_is_looked_at() -> None:
    race, looked_at = next(drops()), list[int]()
    taken, samples = race.take(4)
    race.report(1, samples, [1.0] * len(samples))

    def preference(candidate: int) -> float:
        looked_at.append(candidate)
        return 1.0 if candidate in (20, 25) else -1.0

    now = race.exchange(taken[2:], samples, [1, 2, 20, 25, BASE], preference)  # 1 is done, 2 is taken
    assert sorted(now) == [20, 25]
    assert set(looked_at) == {2, 3, 20, 25}
    assert race.take(2)[0] == [2, 3]  # given back


def test_who_is_set_aside_stops_nothing() -> None:
    nll, tokens = losses(4, 30)
    race = Race(make_schedule(30, N_SEARCH, N_HOLDOUT, 0.5), tokens, empty(nll))
    worst_luck = sorted(best(nll, tokens, 2))
    race.set_aside(worst_luck[0])
    race.take(30)
    race.give_back(range(30))
    race.set_aside(worst_luck[1])
    scored = finish(race, nll)
    assert not {candidate for candidate, _ in scored} & set(worst_luck)


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    nll, tokens = losses(5, 40)
    nll[7], nll[9] = np.nan, np.inf
    race = Race(make_schedule(40, N_SEARCH, N_HOLDOUT, 0.4), tokens, empty(nll))
    finish(race, nll)
    assert race.seen_N()[7] == race.seen_N()[9] == race.schedule.rungs[0]


def test_when_time_is_over_who_was_not_reached_is_left_out() -> None:
    nll, tokens = losses(6, 50)
    left = math.inf
    race = Race(make_schedule(50, N_SEARCH, N_HOLDOUT, None), tokens, empty(nll), lambda: left)
    for _ in range(30):
        (candidate,), samples = race.take(1)
        race.report(candidate, samples, nll[candidate, samples])
    left = 0.0
    assert race.drop_pending() == list(range(30, 50))
    finish(race, nll)
    assert (race.seen_N()[1:30] == S).sum() == KEEP == finalists(50)
    assert race.drop_pending() == []


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 40))
def test_a_race_with_a_risk_depends_on_the_scores_alone(seed: int, workers: int) -> None:
    nll, tokens = losses(seed, 120)
    schedule = make_schedule(120, N_SEARCH, N_HOLDOUT, 0.3, risk=0.1)
    one, many = Race(schedule, tokens, empty(nll)), Race(schedule, tokens, empty(nll))
    finish(one, nll)
    scored = finish(many, nll, np.random.default_rng(seed), workers)
    assert one.seen_N().tolist() == many.seen_N().tolist()
    assert max(scored.values()) == 1


def test_a_risk_saves_scores_and_keeps_the_best() -> None:
    used, lost = [0, 0], 0
    for seed in range(20):
        nll, tokens = losses(seed, 200)
        schedules = [make_schedule(200, N_SEARCH, N_HOLDOUT, 0.5, risk=risk) for risk in (0.0, 0.1)]
        plain, risky = (Race(schedule, tokens, empty(nll)) for schedule in schedules)
        used[0] += len(finish(plain, nll))
        used[1] += len(finish(risky, nll))
        lost += len(best(nll, tokens, 3) - set(np.flatnonzero(risky.seen_N() == S).tolist()))
        assert (risky.seen_N()[1:] == S).sum() >= KEEP
    assert used[1] < 0.9 * used[0]
    assert lost <= 3


def test_a_loss_that_is_no_number_stops_no_race_with_a_risk() -> None:
    nll, tokens = losses(5, 60)
    nll[7], nll[9] = np.nan, np.inf
    schedule = make_schedule(60, N_SEARCH, N_HOLDOUT, 0.4, risk=0.1)
    race = Race(schedule, tokens, empty(nll))
    finish(race, nll)
    assert race.seen_N()[7] == race.seen_N()[9] == schedule.rungs[0]
    assert (race.seen_N() == S).sum() >= KEEP


def test_towards_the_end_of_a_rung_engines_share_what_waits() -> None:
    assert [fair_batch(waiting, 1, 32) for waiting in (100, 20, 0)] == [32, 20, 1]
    assert [fair_batch(waiting, 8, 32) for waiting in (1000, 100, 8, 3)] == [32, 13, 1, 1]
    assert fair_batch(100, 0, 32) == 32  # no engine is up yet


def test_who_waits_is_counted() -> None:
    race = next(drops())
    race.take(3)
    assert race.waiting == 27


def test_with_a_risk_rungs_are_closer() -> None:
    assert make_schedule(200, 24, 8, 0.5).rungs == (4, 8, 16, 24, 32)
    assert make_schedule(200, 24, 8, 0.5, risk=0.1).rungs == (4, 6, 8, 12, 16, 24, 32)


def test_a_bound_is_on_the_paired_difference() -> None:
    """Of two candidates whose means differ by as much, the one that is worse on every sample is out, the other may be unlucky."""
    tokens = np.ones(8, np.float32)
    reference = np.linspace(1, 3, 8, dtype=np.float32)
    steady = reference + 0.2
    unlucky = reference + np.array([1.6, 0, 0, 0, 0, 0, 0, 0], np.float32)
    typical = reference + np.array([0.05, -0.05] * 4, np.float32)
    rows = np.stack([steady, unlucky, typical, reference])
    assert surely_above(rows, reference, tokens, 0.99).tolist() == [True, False, False, False]
    assert surely_above(rows[:1], reference, tokens, 0.6).tolist() == [True]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_rungs_shrink_evenly_so_that_no_rung_eats_the_budget(share: float) -> None:
    nll, tokens = losses(7, 400)
    usual = make_schedule(400, N_SEARCH, N_HOLDOUT, share)
    schedule = Schedule(usual.rungs, usual.budget, 1 - 1e-12)
    race = Race(schedule, tokens, empty(nll))
    finish(race, nll)
    entrants = [int((race.rungs_N >= rung + 1).sum()) for rung in range(len(schedule.rungs))]
    assert entrants[0] == 400
    assert entrants == sorted(entrants, reverse=True)
    assert min(entrants) >= KEEP + 1
