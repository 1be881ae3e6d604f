"""Rewards to coefficients: z-scores with exact sums, and what happens when members could not be scored."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import rankdata

from mpies.es.fitness import centered_rank, coefficients, zscore

NAN, INF = math.nan, math.inf


def random_rewards(size: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-100, 30, size)


@pytest.mark.parametrize("size", [2, 3, 16, 30, 101])
def test_plain_formula(size):
    rewards = random_rewards(size, size)
    expected = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(zscore(rewards), expected, rtol=1e-12)


def test_values_by_hand():
    assert zscore(np.array([1.0, 3.0])).tolist() == [-1, 1]
    assert zscore(np.array([-4.0, 0, 0, 0, 0, 4, 0, 0])).tolist() == [-2, 0, 0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize(
    "rewards",
    [
        [0.0] * 4,
        [-172.5] * 30,
        [0.1] * 7,
        [5.0],
        # Equal but for the rounding of different ways to sum up.
        [0.1 + 0.2, 0.3, 0.3, 0.3],
        [1e6 / 3, np.nextafter(1e6 / 3, 0), 1e6 / 3],
        [5e-324, 5e-324],
    ],
)
def test_without_spread_nobody_counts(rewards):
    assert zscore(np.array(rewards)).tolist() == [0] * len(rewards)


@pytest.mark.parametrize("spread", [1e-9, 1e-6, 1.0])
def test_a_small_spread_counts(spread):
    np.testing.assert_allclose(zscore(np.array([1, 1 + spread])), [-1, 1])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_members_without_a_score_are_left_out(bad):
    rewards = random_rewards(10)
    some = rewards.copy()
    some[[0, 4, 9]] = bad
    made = zscore(some)
    scored = np.isfinite(some)
    assert made[~scored].tolist() == [0, 0, 0]
    assert np.array_equal(made[scored], zscore(rewards[scored]))


@pytest.mark.parametrize("rewards", [[NAN], [NAN, NAN], [NAN, INF, -INF], [NAN, 3.0]])
def test_too_few_scores(rewards):
    assert zscore(np.array(rewards)).tolist() == [0] * len(rewards)


def test_rewards_stay_as_they_were():
    rewards = np.array([1.0, NAN, 3.0])
    zscore(rewards)
    assert np.array_equal(rewards, [1.0, NAN, 3.0], equal_nan=True)


def test_order_of_members_does_not_change_the_bits():
    rewards = random_rewards(101) * 10.0 ** np.random.default_rng(1).integers(-6, 6, 101)
    rewards[[3, 50]] = NAN
    made = zscore(rewards)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(rewards))
        assert np.array_equal(zscore(rewards[order]), made[order])


# With the last three, the pow() of glibc 2.3x shows in the bits; multiplication is exact everywhere.
@pytest.mark.parametrize(
    "rewards",
    [
        *(random_rewards(30, seed).tolist() for seed in range(20)),
        [-786.5, -1918.0, -1830.5],
        [-772.5, -1698.5, -1680.0],
        [-1154.0, -1028.0, -1846.5],
    ],
)
def test_every_step_is_rounded_correctly(rewards):
    """So that every machine has the same bits, whatever its libraries."""
    mean = float(sum(map(Fraction, rewards))) / len(rewards)
    squares = [(r - mean) * (r - mean) for r in rewards]
    deviation = math.sqrt(float(sum(map(Fraction, squares))) / len(rewards))
    assert zscore(np.array(rewards)).tolist() == [(r - mean) / deviation for r in rewards]


def test_large_and_cancelling_rewards():
    made = zscore(np.array([1e100, 1, -1e100]))
    np.testing.assert_allclose(made, [math.sqrt(1.5), 0, -math.sqrt(1.5)], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_rewards_of_any_size(scale):
    """A reward function may return any finite number; it must not stop the run."""
    np.testing.assert_allclose(zscore(np.array([-scale, scale])), [-1, 1])


def test_coefficients_absorb_alpha_and_the_population():
    rewards = random_rewards(30)
    made = coefficients(rewards, 0.0005)
    assert made.dtype == np.float32 and made.shape == (30,)
    assert np.array_equal(made, (0.0005 / 30 * zscore(rewards)).astype(np.float32))


def test_coefficients_count_unscored_members_in_the_population():
    made = coefficients(np.array([1.0, 3.0, NAN, NAN]), 1.0)
    assert made.tolist() == [-0.25, 0.25, 0, 0]


def test_coefficients_sum_up_to_zero():
    assert abs(coefficients(random_rewards(64), 1.0).sum()) < 1e-6


def test_no_step_without_alpha():
    assert not coefficients(random_rewards(), 0.0).any()


# Centered ranks


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([3.0, 1.0, 2.0], [0.5, -0.5, 0]),
        ([-1e300, 1e300], [-0.5, 0.5]),
        ([1.0, 2.0, 2.0, 3.0], [-0.5, 0, 0, 0.5]),
        ([1.0, 1.0, 3.0], [-0.25, -0.25, 0.5]),
        ([5.0, 5.0, 5.0], [0, 0, 0]),
        ([NAN, 1.0, 2.0], [0, -0.5, 0.5]),
        ([NAN, 1.0, INF, 2.0, -INF], [0, -0.5, 0, 0.5, 0]),
        ([7.0], [0]),
        ([NAN, 7.0], [0, 0]),
        ([NAN, NAN], [0, 0]),
        ([0.0, -0.0, 1.0], [-0.25, -0.25, 0.5]),
    ],
)
def test_centered_ranks(rewards, expected):
    made = centered_rank(np.array(rewards))
    assert made.dtype == np.float64 and made.tolist() == expected


def test_centered_ranks_are_those_of_scipy():
    rewards = np.random.default_rng(0).integers(0, 20, 31).astype(float)
    expected = (rankdata(rewards) - 1) / 30 - 0.5
    np.testing.assert_allclose(centered_rank(rewards), expected, atol=1e-15)
    assert abs(centered_rank(rewards).sum()) < 1e-12


def test_centered_ranks_do_not_depend_on_the_order_or_the_scale():
    rewards = random_rewards(30)
    order = np.random.default_rng(1).permutation(30)
    assert np.array_equal(centered_rank(rewards[order]), centered_rank(rewards)[order])
    assert np.array_equal(centered_rank(rewards * 1000 - 5), centered_rank(rewards))


def test_coefficients_of_centered_ranks():
    made = coefficients(np.array([1.0, 3.0, 2.0, NAN]), 8.0, "centered_rank")
    assert made.dtype == np.float32 and made.tolist() == [-1, 1, 0, 0]
