"""Evolution strategies on functions with a known answer: the direction, the size and the goal of the steps.

What theory says. Let g be the gradient of a linear reward R = g . theta, u_n = g . eps_n / |g| and s the
standard deviation of u_1 ... u_N. Then Z_n = (u_n - mean(u)) / s, whatever sigma and |g| are. The step
alpha / N sum_n Z_n eps_n has, along g, the length alpha / N sum_n Z_n u_n = alpha s. In each of the d - 1
directions across, eps is independent of Z and sum_n Z_n^2 = N, so the step there is normal with
standard deviation alpha / sqrt(N). N s^2 being chi-square with N - 1 degrees of freedom,

    cos^2(step, g) = s^2 / (s^2 + chi^2(d - 1) / N)  is distributed as  Beta((N - 1) / 2, (d - 1) / 2),

with mean (N - 1) / (N + d - 2), roughly N / (N + d). Antithetic members have M = N / 2 directions with
Z = +-u_m / s, s^2 = mean(u_m^2), which is chi-square with M degrees of freedom (the mean is zero by
itself) over M, and a step of alpha / M sum_m (u_m / s) eps_m. So cos^2 is Beta(M / 2, (d - 1) / 2).

Bounds are what a right program misses with a probability below 1e-6; seeds are fixed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from mpies.es.directions import directions
from mpies.es.fitness import coefficients
from mpies.es.population import Population
from mpies.model.weights import take_over
from mpies.noise import definition
from mpies.noise.cpu import CpuKernels

pytestmark = pytest.mark.lengthy

IMPROBABLE = 1e-6
Reward = Callable[[np.ndarray], float]


class Point(torch.nn.Module):
    """A model that is a point in space, its coordinates in a matrix and a vector."""

    def __init__(self, rows: int, columns: int, rest: int):
        super().__init__()
        self.config = SimpleNamespace()
        self.matrix = torch.nn.Parameter(torch.zeros(rows, columns))
        self.vector = torch.nn.Parameter(torch.zeros(rest))


class Es:
    """The generation loop of `mpies.train`, without ranks and language."""

    def __init__(
        self,
        reward: Reward,
        sigma: float,
        alpha: float,
        size: int,
        antithetic: bool,
        d: int = 50,
        rank: int = 0,
    ):
        point = Point(4, d // 5, d - 4 * (d // 5))
        self.weights = take_over(point, torch.float32, torch.device("cpu"), CpuKernels(), rank)
        self.population = Population(size, 42, antithetic)
        self.reward, self.sigma, self.alpha = reward, sigma, alpha

    def live(self) -> np.ndarray:
        return torch.cat([t.reshape(-1) for t in self.weights.live.values()]).double().numpy()

    def position(self) -> np.ndarray:
        self.weights.show_base()
        return self.live()

    def perturb(self, seed: int, scale: float) -> None:
        """Weights with low-rank noise are made up here: the program never holds them."""
        self.weights.perturb(seed, scale)
        rank, base = self.weights.rank, self.weights.base["matrix"]
        if rank:
            number = self.weights.ids["matrix"]
            a, b = definition.factors(seed, number, tuple(base.shape), rank)
            noise = torch.from_numpy(a.T @ b / np.float32(math.sqrt(rank)))
            self.weights.show([("matrix", base + scale * noise)])

    def step(self, generation: int) -> np.ndarray:
        """Evolve for one generation; the movement."""
        before = self.position()
        members = self.population.members(generation)
        rewards = np.zeros(len(members))
        for member in members:
            self.perturb(member.seed, self.sigma * member.sign)
            rewards[member.index] = self.reward(self.live())
        seeds = np.array([m.seed for m in members], dtype=np.uint64)
        signs = np.array([m.sign for m in members], dtype=np.int8)
        self.weights.update(*directions(seeds, signs, coefficients(rewards, self.alpha)))
        return self.position() - before


def random_direction(d: int) -> np.ndarray:
    g = np.random.default_rng(1).normal(size=d)
    return g / np.linalg.norm(g)


def cosine_distribution(size: int, antithetic: bool, d: int):
    freedom = size // 2 if antithetic else size - 1
    return stats.beta(freedom / 2, (d - 1) / 2)


POPULATIONS = pytest.mark.parametrize("size, antithetic", [(2, True), (16, False), (16, True), (30, False)])


@POPULATIONS
@pytest.mark.parametrize("d", [10, 50])
def test_direction_on_a_linear_reward(size, antithetic, d):
    g = random_direction(d)
    es = Es(lambda x: float(7 * g @ x), 0.1, 0.01, size, antithetic, d)
    steps = [es.step(generation) for generation in range(200)]
    cosines = np.array([g @ step / np.linalg.norm(step) for step in steps])
    assert (cosines > 0).all()
    theory = cosine_distribution(size, antithetic, d)
    assert stats.kstest(cosines**2, theory.cdf).pvalue > IMPROBABLE
    # Sharper on the mean than a test of the whole distribution.
    bound = stats.norm.isf(IMPROBABLE / 2) * theory.std() / math.sqrt(len(cosines))
    assert abs((cosines**2).mean() - theory.mean()) < bound


@pytest.mark.parametrize("size, antithetic, sigma", [(16, True, 0.3), (16, False, 0.001)])
def test_direction_on_a_quadratic_reward(size, antithetic, sigma):
    """R = -|theta - goal|^2. In an antithetic pair the curvature cancels, so that sigma may be large;
    otherwise it must be so small that the curvature does not count."""
    d = 50
    goal = random_direction(d)
    es = Es(lambda x: -float(((x - goal) ** 2).sum()), sigma, 0.001, size, antithetic, d)
    cosines = []
    for generation in range(200):
        gradient = goal - es.position()
        step = es.step(generation)
        cosines.append(gradient @ step / np.linalg.norm(gradient) / np.linalg.norm(step))
    theory = cosine_distribution(size, antithetic, d)
    assert stats.kstest(np.square(cosines), theory.cdf).pvalue > IMPROBABLE
    assert min(cosines) > 0


@POPULATIONS
@pytest.mark.parametrize("sigma, alpha", [(0.1, 0.01), (0.5, 0.3)])
def test_mean_step_is_alpha_along_the_gradient(size, antithetic, sigma, alpha):
    """Along g the step is alpha s, and s is a chi over the root of its size: mean just below 1. The
    size of the gradient and sigma do not matter, as the paper's alpha has 1 / sigma absorbed."""
    d = 20
    g = random_direction(d)
    es = Es(lambda x: float(1e-3 * g @ x), sigma, alpha, size, antithetic, d)
    steps = np.array([es.step(generation) for generation in range(200)])
    freedom, count = (size // 2,) * 2 if antithetic else (size - 1, size)
    s = stats.chi(freedom, scale=1 / math.sqrt(count))
    sigmas = stats.norm.isf(IMPROBABLE / 2)
    along = steps @ g / alpha
    assert abs(along.mean() - s.mean()) < sigmas * s.std() / math.sqrt(len(steps))
    # Across, nothing but the noise of the estimate.
    across = (steps - np.outer(steps @ g, g)) / alpha
    count_across = size // 2 if antithetic else size
    expected = (d - 1) / count_across
    spread = expected * math.sqrt(2 / (d - 1) / len(steps))
    assert abs((across**2).sum(axis=1).mean() - expected) < sigmas * spread
    assert np.linalg.norm(across.mean(axis=0)) < 2 * math.sqrt(expected / len(steps))


@pytest.mark.parametrize("rank", [0, 1, 3], ids=["full", "rank 1", "rank 3"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_converges_on_a_quadratic(antithetic, rank):
    """From distance 10 to within the reach of a step: |step| is about alpha sqrt(1 + d / directions)."""
    d, alpha, size = 20, 0.05, 16
    goal = 10 * random_direction(d)
    es = Es(lambda x: -float(((x - goal) ** 2).sum()), 0.05, alpha, size, antithetic, d, rank)
    distances = [np.linalg.norm(es.position() - goal)]
    for generation in range(400):
        es.step(generation)
        distances.append(np.linalg.norm(es.position() - goal))
    assert distances[0] == pytest.approx(10)
    # At first straight towards the goal, alpha a step.
    assert distances[100] == pytest.approx(10 - 100 * alpha, rel=0.2)
    step = alpha * math.sqrt(1 + d / (size // 2 if antithetic else size))
    assert max(distances[-100:]) < 4 * step
    if antithetic:
        # At the goal, pairs tie, and what spread there is comes from the curvature: the steps die out.
        assert distances[-1] < 1e-3


def test_stands_still_where_all_rewards_are_equal():
    es = Es(lambda x: 3.0, 0.1, 0.1, 16, False)
    assert not es.step(0).any()


def test_members_that_cannot_be_scored_do_not_lead_astray():
    """The rewards of every third member are lost; the others still find the way."""
    d = 20
    g = random_direction(d)
    calls = iter(range(10**9))
    es = Es(lambda x: math.nan if next(calls) % 3 == 0 else float(g @ x), 0.1, 0.01, 30, False, d)
    steps = np.array([es.step(generation) for generation in range(100)])
    cosines = steps @ g / np.linalg.norm(steps, axis=1)
    theory = cosine_distribution(20, False, d)
    assert abs((cosines**2).mean() - theory.mean()) < stats.norm.isf(IMPROBABLE / 2) * theory.std() / 10
