"""Noise as a random number generator.

Every bound is what a right generator exceeds with a probability below 1e-6. The seeds are fixed, so a
test that passes once passes always.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from scipy import stats

from mpies.es.population import Population
from mpies.noise.definition import CHUNK, TABLE, normal, parameter_id

IMPROBABLE = 1e-6
SIGMAS = stats.norm.isf(IMPROBABLE / 2)
MILLION = 1_000_000


@functools.lru_cache(maxsize=8)
def noise(seed: int, name: str = "model.layers.0.mlp.up_proj.weight", count: int = MILLION) -> np.ndarray:
    return normal(seed, parameter_id(name), 0, count).astype(np.float64)


def assert_uncorrelated(a: np.ndarray, b: np.ndarray, comparisons: int = 1) -> None:
    """The correlation of independent normals has standard deviation 1 / sqrt(count)."""
    bound = stats.norm.isf(IMPROBABLE / comparisons / 2) / math.sqrt(a.size)
    assert abs((a * b).mean()) < bound
    # Squares and signs too: equal magnitudes with random signs are uncorrelated, yet not independent.
    squares = (a**2 - 1) * (b**2 - 1)
    assert abs(squares.mean()) < 2 * bound


SAMPLES = pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**64 - 1])


@SAMPLES
def test_moments(seed):
    z = noise(seed)
    # Standard errors of the sample moments of a normal: 1, 2, 6 (skewness), 24 (kurtosis), over n.
    assert abs(z.mean()) < SIGMAS * math.sqrt(1 / z.size)
    assert abs(z.var() - 1) < SIGMAS * math.sqrt(2 / z.size)
    assert abs(stats.skew(z)) < SIGMAS * math.sqrt(6 / z.size)
    # Cutting the tails at 3.84 lowers the kurtosis by 0.0035.
    assert abs(stats.kurtosis(z) - (TABLE.astype(float) ** 4).mean() + 3) < SIGMAS * math.sqrt(24 / z.size)


def test_the_table_is_as_normal_as_it_can_be():
    """What no sample shows: 8192 levels give kurtosis 2.997, and a distribution within half a level."""
    table = TABLE.astype(np.float64)
    assert abs((table**4).mean() - 3) < 0.01
    levels = (np.arange(table.size) + 0.5) / table.size
    assert np.abs(stats.norm.cdf(table) - levels).max() < 0.5 / table.size


@SAMPLES
def test_distribution_is_normal(seed):
    assert stats.kstest(noise(seed), "norm").pvalue > IMPROBABLE


@SAMPLES
def test_levels_are_equally_frequent(seed):
    counts = np.bincount(np.searchsorted(TABLE, noise(seed).astype(np.float32)), minlength=TABLE.size)
    assert IMPROBABLE < stats.chisquare(counts).pvalue < 1 - IMPROBABLE


@SAMPLES
@pytest.mark.parametrize("beyond", [2, 3, 3.5])
def test_tails(seed, beyond):
    z = noise(seed)
    # The share of the table, which differs from the normal's by at most one level in 8192.
    share = (np.abs(TABLE) > beyond).mean()
    assert abs(share - 2 * stats.norm.sf(beyond)) <= 2 / TABLE.size
    for tail in (z > beyond, z < -beyond):
        assert stats.binomtest(int(tail.sum()), z.size, share / 2).pvalue > IMPROBABLE


@pytest.mark.parametrize("seed", [0, 41, 2**32 - 1, 2**64 - 2])
def test_neighbouring_seeds(seed):
    assert_uncorrelated(noise(seed), noise(seed + 1))


@pytest.mark.parametrize("bit", [0, 1, 16, 31, 32, 63])
def test_seeds_that_differ_in_one_bit(bit):
    assert_uncorrelated(noise(12345), noise(12345 ^ 1 << bit))


def test_parameters_of_equal_shape():
    """The authors' code gives these the same numbers."""
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj")
    names = [f"model.layers.{layer}.{kind}.weight" for layer in (0, 1, 11) for kind in kinds]
    drawn = [noise(42, name, 100_000) for name in names]
    pairs = [(a, b) for a in range(len(drawn)) for b in range(a)]
    for a, b in pairs:
        assert_uncorrelated(drawn[a], drawn[b], len(pairs))


@SAMPLES
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 127, 128, 256, CHUNK, 2 * CHUNK, 4096])
def test_lags_within_a_tensor(seed, lag):
    z = noise(seed)
    assert_uncorrelated(z[:-lag], z[lag:])


def test_columns_of_a_matrix_are_independent():
    """A matrix whose width is that of a chunk is the worst case for a layout by chunks."""
    matrix = noise(7, count=4096 * CHUNK).reshape(4096, CHUNK)
    correlations = matrix.T @ matrix / len(matrix)
    off_diagonal = np.abs(correlations[np.triu_indices(CHUNK, 1)])
    assert off_diagonal.max() < stats.norm.isf(IMPROBABLE / 2 / off_diagonal.size) / math.sqrt(len(matrix))
    # All of them together: their squares sum up to a chi-square.
    assert stats.chi2.sf((off_diagonal**2).sum() * len(matrix), off_diagonal.size) > IMPROBABLE


@pytest.mark.parametrize("es_seed", [0, 42])
def test_members_of_a_population_and_its_neighbours_in_time(es_seed):
    population = Population(16, es_seed)
    members = [m for generation in (0, 1, 2) for m in population.members(generation)]
    drawn = np.stack([noise(member.seed, count=50_000) for member in members])
    correlations = drawn @ drawn.T / drawn.shape[1]
    off_diagonal = np.abs(correlations[np.triu_indices(len(drawn), 1)])
    bound = stats.norm.isf(IMPROBABLE / 2 / off_diagonal.size) / math.sqrt(drawn.shape[1])
    assert off_diagonal.max() < bound


def test_runs_with_neighbouring_seeds_have_other_members():
    runs = [Population(64, seed).members(g) for seed in (41, 42, 43) for g in range(20)]
    seeds = [member.seed for members in runs for member in members]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("antithetic, distinct", [(False, 64), (True, 32)])
def test_seeds_of_a_long_run_are_distinct(antithetic, distinct):
    population = Population(64, 42, antithetic)
    seeds = {member.seed for generation in range(200) for member in population.members(generation)}
    assert len(seeds) == 200 * distinct


def test_seeds_are_uniform():
    population = Population(64, 42)
    seeds = [member.seed for generation in range(200) for member in population.members(generation)]
    octets = np.array(seeds, dtype="<u8").view(np.uint8).reshape(-1, 8)
    for column in octets.T:
        assert stats.chisquare(np.bincount(column, minlength=256)).pvalue > IMPROBABLE
