"""Factor arithmetic against the same sums and truncations done on dense matrices."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.adapters.low_rank import (
    DENSITY,
    Factors,
    ab_mean,
    dare,
    drop_null_rank,
    factorise,
    pad,
    ties,
    truncate,
    weighted_sum,
)

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def factors(rank: int, out: int, inside: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Factors(draw(rank, inside), draw(out, rank))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(SIZES, st.floats(-2, 2)), min_size=1, max_size=4), SIZES, SIZES, SEEDS)
def test_weighted_sum_is_the_sum_of_dense_deltas(
    ranks_and_weights: list[tuple[int, float]], out: int, inside: int, seed: int
) -> None:
    parts = [factors(rank, out, inside, seed + place) for place, (rank, _) in enumerate(ranks_and_weights)]
    weights = [weight for _, weight in ranks_and_weights]
    merged = weighted_sum(parts, weights)
    expected = sum(weight * (part.b_OR @ part.a_RI) for part, weight in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged.dense(), expected)
    assert merged.rank == sum(rank for rank, _ in ranks_and_weights)


@settings(max_examples=80, deadline=None)
@given(rank=SIZES, out=SIZES, inside=SIZES, wished=SIZES, seed=SEEDS)
def test_truncate_is_the_truncated_svd_of_the_dense_delta(rank: int, out: int, inside: int, wished: int, seed: int) -> None:
    delta = factors(rank, out, inside, seed)
    found, energy = truncate(delta, wished)
    u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
    kept = min(wished, rank, out, inside)
    torch.testing.assert_close(found.dense(), (u[:, :kept] * s[:kept]) @ vh[:kept], rtol=1e-6, atol=1e-8)
    assert found.rank == kept
    assert energy == pytest.approx(float((s[:kept] ** 2).sum() / (s**2).sum()))


@settings(max_examples=20, deadline=None)
@given(rank=SIZES, seed=SEEDS)
def test_truncate_shares_the_scale_between_both_factors(rank: int, seed: int) -> None:
    found, _ = truncate(factors(rank, 12, 10, seed), rank)
    torch.testing.assert_close(found.b_OR.norm(dim=0), found.a_RI.norm(dim=1))


def test_truncate_of_nothing_keeps_everything() -> None:
    found, energy = truncate(Factors(torch.zeros(2, 5), torch.zeros(4, 2)), 1)
    assert energy == 1.0
    assert torch.equal(found.dense(), torch.zeros(4, 5))


def test_ab_mean_averages_the_factors_and_is_not_the_mean_delta() -> None:
    parts = [factors(3, 6, 5, seed) for seed in range(2)]
    weights = [0.5, 0.5]
    found = ab_mean(parts, weights)
    torch.testing.assert_close(found.a_RI, (parts[0].a_RI + parts[1].a_RI) / 2)
    torch.testing.assert_close(found.b_OR, (parts[0].b_OR + parts[1].b_OR) / 2)
    assert (found.dense() - weighted_sum(parts, weights).dense()).norm() > 0.1


def test_ab_mean_of_equal_donors_is_that_donor() -> None:
    one = factors(3, 6, 5, 0)
    torch.testing.assert_close(ab_mean([one, one], [0.5, 0.5]).dense(), one.dense())


@settings(max_examples=30, deadline=None)
@given(rank=SIZES, more=st.integers(0, 6), seed=SEEDS)
def test_pad_adds_rank_that_can_learn_and_leaves_the_delta(rank: int, more: int, seed: int) -> None:
    drawn = factors(rank, 7, 8, seed)
    delta = Factors(drawn.a_RI.float(), drawn.b_OR.float())
    padded = pad(delta, rank + more, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(padded.dense(), delta.dense())
    fresh = padded.a_RI[rank:]
    assert padded.rank == rank + more
    assert torch.all(padded.b_OR[:, rank:] == 0)
    assert torch.all(fresh.abs() <= 8**-0.5)
    assert torch.all(fresh.abs().sum(dim=1) > 0)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 4), seed=SEEDS)
def test_ties_trims_elects_a_sign_and_averages_those_that_agree(count: int, seed: int) -> None:
    parts = [factors(3, 6, 5, seed + place) for place in range(count)]
    found = ties(parts, [1 / count] * count)
    trimmed = []
    for part in parts:
        values = part.dense()
        smallest_kept = values.abs().flatten().sort(descending=True).values[int(DENSITY * values.numel()) - 1]
        trimmed.append(torch.where(values.abs() >= smallest_kept, values, 0))
    for row in range(6):
        for column in range(5):
            values = [float(one[row, column]) for one in trimmed]
            sign = 1 if sum(values) >= 0 else -1
            agree = [value for value in values if value * sign > 0]
            assert float(found[row, column]) == pytest.approx(sum(agree) / len(agree) if agree else 0, abs=1e-9)


def test_dare_drops_half_of_the_values_doubles_the_others_and_is_seeded() -> None:
    parts = [factors(3, 60, 50, seed) for seed in range(2)]
    found = dare(parts[:1], [1.0])
    kept = found != 0
    torch.testing.assert_close(found[kept], parts[0].dense()[kept] / DENSITY)
    assert kept.double().mean() == pytest.approx(DENSITY, abs=0.05)
    state = torch.random.get_rng_state()
    assert torch.equal(dare(parts, [0.7, -0.2]), dare(parts, [0.7, -0.2]))
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = dare([parts[0]], [0.7])
    both = dare(parts, [0.7, -0.2])
    assert not torch.equal(alone, both)


@pytest.mark.parametrize("method", [ties, dare])
def test_dense_methods_compute_where_their_parts_are(method: Callable[..., torch.Tensor]) -> None:
    parts = [factors(2, 6, 4, seed).to(torch.device("meta")) for seed in range(3)]
    assert method(parts, [0.2, 0.3, 0.5]).device.type == "meta"


@settings(max_examples=40, deadline=None)
@given(rank=SIZES, out=SIZES, inside=SIZES, seed=SEEDS)
def test_factorise_gives_back_a_delta_weight_of_that_rank(rank: int, out: int, inside: int, seed: int) -> None:
    delta_OI = factors(rank, out, inside, seed).dense()
    found, energy = factorise(delta_OI, rank)
    torch.testing.assert_close(found.dense(), delta_OI, rtol=1e-6, atol=1e-8)
    assert found.rank == min(rank, out, inside)
    assert energy == pytest.approx(1.0)


def test_factorise_at_a_smaller_rank_is_nearly_the_truncated_svd() -> None:
    delta_OI = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, energy = factorise(delta_OI, 10)
    best = (torch.linalg.svdvals(delta_OI)[:10] ** 2).sum() / (delta_OI**2).sum()
    assert energy == pytest.approx(float(best), rel=0.01)
    left = ((delta_OI - found.dense()) ** 2).sum() / (delta_OI**2).sum()
    assert float(left) == pytest.approx(1 - energy, rel=0.01)


def test_rank_that_adds_nothing_is_left_out() -> None:
    """It would stay so in training; `pad` puts fresh rank in its place."""
    donor = factors(3, 20, 30, seed=2)
    cut, _ = truncate(weighted_sum([donor, donor], [0.5, 0.5]), 6)
    assert cut.rank == 6
    assert drop_null_rank(cut).rank == 3
    torch.testing.assert_close(drop_null_rank(cut).dense(), donor.dense())
    assert drop_null_rank(donor).rank == 3
    assert drop_null_rank(Factors(donor.a_RI, torch.zeros(20, 3, dtype=torch.float64))).rank == 0
