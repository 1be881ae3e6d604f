"""Figures of evaluations against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpies.measure.kl import k3
from mpies.measure.statistics import Figure, over_prompts, pass_at, pass_ks, per_token


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    rng = np.random.default_rng(n)
    right = rng.random((6, n)) < np.linspace(0, 1, 6)[:, None]
    for k in range(1, n + 1):
        shares = [np.mean([any(row[list(s)]) for s in itertools.combinations(range(n), k)]) for row in right]
        assert pass_at(right, k).mean == pytest.approx(np.mean(shares), abs=1e-12)
        assert pass_at(right, k).error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(6))


def test_pass_at_k_is_unbiased():
    """Its mean over many draws of 4 answers, each right with chance 0.3, is 1 - 0.7^k."""
    right = np.random.default_rng(0).random((50_000, 4)) < 0.3
    for k in (1, 2, 4):
        found = pass_at(right, k)
        assert abs(found.mean - (1 - 0.7**k)) < 4 * found.error


def test_pass_at_k_leaves_out_what_could_not_be_scored():
    right = np.array([[np.nan, np.nan, 1, 1], [1, 0, 0, 0], [np.nan, np.nan, np.nan, 1]])
    assert pass_at(right, 1).mean == pytest.approx((1 + 0.25 + 1) / 3)
    assert pass_at(right, 2).mean == pytest.approx((1 + 0.5) / 2), "the third prompt has one answer only"
    assert math.isnan(pass_at(right[2:], 4).mean)


def test_ks():
    assert pass_ks(1) == []
    assert pass_ks(2) == [1, 2]
    assert pass_ks(8) == [1, 2, 4, 8]
    assert pass_ks(20) == [1, 2, 4, 8, 16, 20]


def test_error_over_prompts():
    """Many answers to two prompts do not make the mean surer than two prompts can."""
    values = np.repeat([[0.0], [1.0]], 100, axis=1)
    assert over_prompts(values) == Figure(0.5, 0.5)
    values[0, 7] = np.nan
    assert over_prompts(values) == Figure(0.5, 0.5)
    assert math.isnan(over_prompts(np.ones((1, 5))).error)
    assert math.isnan(over_prompts(np.full((3, 2), np.nan)).mean)


def test_error_per_token():
    """The spread of the ratio over repeated draws of prompts is what its standard error says."""
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(1, 20, (40, 3)).astype(float)
        found = per_token(tokens * rng.gamma(2, 1, (40, 1)), tokens)
        ratios.append(found.mean)
        errors.append(found.error)
    assert np.mean(ratios) == pytest.approx(2, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_k3():
    r = np.array([1e-3, 0.5, 1.0, 2.0, 30.0])
    np.testing.assert_allclose(k3(np.log(r), np.zeros(5)), r - np.log(r) - 1, rtol=1e-12, atol=1e-15)
    assert k3(np.array([1e-9]), np.zeros(1))[0] == pytest.approx(5e-19, rel=1e-6)
