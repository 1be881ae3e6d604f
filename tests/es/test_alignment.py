"""Cosines of updates: computed from coefficients, against the updates themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpies.es.alignment import cosine
from mpies.es.directions import fold
from mpies.es.fitness import coefficients
from mpies.es.population import Population
from mpies.noise import definition

MEMBERS, PARAMETERS, MATRIX = 12, 40_000, (160, 250)


def update_of(members, factors: np.ndarray, rank: int) -> np.ndarray:
    """The sum of factor * sign * noise(seed) itself, by the definition, float64 (PARAMETERS,)."""
    total = np.zeros(PARAMETERS)
    for member, factor in zip(members, factors, strict=True):
        seeds, one = np.array([member.seed], np.uint64), np.ones(1, np.float32)
        if rank:
            noise = definition.lowrank_updated(np.zeros(MATRIX, np.float32), seeds, one, 7, rank).ravel()
        else:
            noise = definition.updated(np.zeros(PARAMETERS, np.float32), seeds, one, 7)
        total += factor * member.sign * noise
    return total


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("fitness", ["zscore", "centered_rank"])
def test_it_is_that_of_the_updates(rank, antithetic, fitness):
    """Within what independent noise of so few parameters differs from orthogonal noise."""
    members = Population(MEMBERS, 5, antithetic).members(3)
    random = np.random.default_rng(1)
    length, right = random.normal(60, 9, MEMBERS), random.integers(0, 9, MEMBERS) / 8
    made = coefficients(right - 0.02 * length, 0.5, fitness)
    seeds = np.array([m.seed for m in members], np.uint64)
    signs = np.array([m.sign for m in members], np.int8)
    bound = 4 * math.sqrt(MEMBERS / PARAMETERS)
    if rank:  # noise vectors of a single matrix differ in length
        bound += math.sqrt((2 / MATRIX[0] + 2 / MATRIX[1]) / rank)
    whole = update_of(members, made, rank)
    found = []
    for figure in (length, right):
        own = update_of(members, coefficients(figure, 1.0, fitness), rank)
        direct = whole @ own / np.linalg.norm(whole) / np.linalg.norm(own)
        assert cosine(seeds, signs, made, figure, fitness) == pytest.approx(direct, abs=bound)
        found.append(direct)
    assert max(found) > 0.3, "there is something to compare"


def test_the_rewards_own_cosine_is_1_and_the_opposites_is_minus_1():
    rewards = np.array([0.5, 0.1, 0.9, 0.3])
    seeds, signs = np.array([1, 1, 2, 2], np.uint64), np.array([1, -1, 1, -1])
    made = coefficients(rewards, 0.1)
    assert cosine(seeds, signs, made, 3 + 100 * rewards, "zscore") == pytest.approx(1)
    assert cosine(seeds, signs, made, -rewards, "zscore") == pytest.approx(-1)


def test_what_a_pair_shares_moves_nothing():
    """Both members of a pair longer: their pushes cancel."""
    seeds, signs = np.array([1, 1, 2, 2], np.uint64), np.array([1, -1, 1, -1])
    made = coefficients(np.array([0.5, 0.1, 0.9, 0.3]), 0.1)
    assert math.isnan(cosine(seeds, signs, made, np.array([9.0, 9, 5, 5]), "zscore"))
    assert fold(seeds, signs, np.array([2.0, 2, 1, 4])).tolist() == [0, -3]


def test_there_is_none_without_an_update_or_a_figure():
    seeds, signs, nan = np.arange(3, dtype=np.uint64), np.ones(3), math.nan
    assert math.isnan(cosine(seeds, signs, np.zeros(3), np.arange(3.0), "zscore"))
    assert math.isnan(cosine(seeds, signs, np.arange(3.0), np.full(3, 7.0), "zscore"))
    assert math.isnan(cosine(seeds, signs, np.arange(3.0), np.full(3, nan), "zscore"))


def test_a_member_without_the_figure_has_no_part_in_its_update():
    seeds, signs = np.arange(3, dtype=np.uint64), np.ones(3)
    made = np.array([1.0, 0, 0])
    assert cosine(seeds, signs, made, np.array([math.nan, 1.0, 2.0]), "zscore") == 0
    assert cosine(seeds, signs, 1e-300 * made, np.array([2.0, 1.0, math.nan]), "zscore") == pytest.approx(
        math.sqrt(0.5)
    )
