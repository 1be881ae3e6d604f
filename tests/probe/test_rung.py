"""What a rung's answers tell: parts of variances and standard errors, against data made with known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpies.es.fitness import zscore
from mpies.measure.statistics import Figure
from mpies.probe.rung import Base, Rung, Stride, components, jackknife, over_both, shown, signal

NAN = math.nan


def rung(rewards: np.ndarray, sigma: float = 0.1, marks: np.ndarray | None = None) -> Rung:
    shape = rewards.shape
    unknown = np.full(shape, NAN)
    marks = np.arange(rewards.size).reshape(shape) if marks is None else marks
    return Rung(sigma, rewards, unknown, marks, np.full(shape, 5), 0.25)


def base(rewards: list[float]) -> Base:
    return Base(np.array(rewards), np.full(len(rewards), NAN), np.full(len(rewards), 5), 0.0)


def test_variances_are_found_again():
    """Of many small tables: unbiased, so that the mean of the estimates is what they were made with."""
    random = np.random.default_rng(3)
    pairs, prompts, own, rest = 6, 10, 0.3, 1.1
    found = []
    for _ in range(3000):
        values = own * random.standard_normal((pairs, 1)) + rest * random.standard_normal((pairs, prompts))
        level = 5 * random.standard_normal((1, prompts))
        found.append([*components(values, centred=True), *components(values + level + 2, centred=False)])
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(len(found))
    expected = np.array([own**2, rest**2] * 2)
    assert (np.abs(mean - expected) < 4 * error).all(), (mean, expected, error)
    assert (error < 0.02).all()


def test_signal_is_that_of_a_generation_with_so_many_prompts():
    random = np.random.default_rng(4)
    pairs, prompts, own, rest = 4000, 20, 0.3, 1.0
    half = own * random.standard_normal((pairs, 1)) + rest * random.standard_normal((pairs, prompts))
    common = 0.4 * random.standard_normal((pairs, 1)) + np.linspace(0, 9, prompts)
    rewards = np.stack([common + half, common - half], axis=1).reshape(2 * pairs, prompts)
    for many in (5, 80):
        found = signal(rung(rewards), many)
        assert found.to_noise == pytest.approx(own**2 / (rest**2 / many), rel=0.1)
        spread = math.sqrt(own**2 + 0.4**2 + rest**2 / many)
        assert found.spread == pytest.approx(spread, rel=0.05)


def test_lost_and_disagreement_of_a_table():
    found = rung(
        np.array([[1.0, 0, 0], [0, 0, NAN], [1, 1, 0], [1, 0, 0]]),
        marks=np.array([[1, 2, 3], [1, 2, 4], [5, 5, 5], [5, 6, 7]]),
    )
    assert found.identical == pytest.approx(3 / 6)
    assert found.disagreement.mean == pytest.approx(2 / 5)
    lost = found.lost(base([1.0, 1.0, 0.5]))
    assert lost.mean == pytest.approx(np.mean([0.5, 1, 0, 0.5, 0.5]))
    assert math.isnan(found.accuracy_lost(base([1.0, 1.0, 0.5])).mean)


def test_errors_are_over_pairs_and_prompts():
    """As many tables have them, a little more: see `over_both`."""
    random = np.random.default_rng(6)
    means, errors = [], []
    for _ in range(3000):
        rows, columns = random.standard_normal((8, 1)), 0.7 * random.standard_normal((1, 12))
        found = over_both(rows + columns + 0.5 * random.standard_normal((8, 12)))
        means.append(found.mean)
        errors.append(found.error**2)
    assert 1 <= np.mean(errors) / np.var(means) < 1.1


def test_what_cannot_be_told():
    nothing = signal(rung(np.zeros((6, 4))), 4)
    assert math.isnan(nothing.to_noise) and nothing.spread == 0
    single = signal(rung(np.array([[1.0], [0], [1], [0]])), 1)
    assert math.isnan(single.to_noise)
    unscored = signal(rung(np.full((6, 4), NAN)), 4)
    assert math.isnan(unscored.to_noise)
    assert math.isnan(over_both(np.full((3, 2), NAN)).mean)
    assert math.isnan(over_both(np.ones((3, 1))).error)
    certain = np.repeat([[1.0], [0], [2], [0], [0], [1]], 4, axis=1)
    assert signal(rung(certain), 4).to_noise == math.inf


def test_the_jackknife_of_a_mean_is_its_standard_error():
    rewards = np.random.default_rng(7).standard_normal((12, 5))
    of_pairs = ((rewards[::2] + rewards[1::2]) / 2).mean(axis=1)
    error = jackknife(lambda part: float(part.rewards.mean()), rung(rewards))
    assert error == pytest.approx(of_pairs.std(ddof=1) / math.sqrt(6))


def test_what_a_step_gains_is_told_prompt_by_prompt():
    """Prompts that were not scored are left out; the error is of differences, not of the two rewards."""
    ground = Base(np.array([0.0, 5, 1, NAN]), np.array([1.0, 1, 0, 0]), np.full(4, 5), 0.0)
    after = Base(np.array([1.0, 6.5, 1.5, 2]), np.array([1.0, 0, 0, 0]), np.full(4, 5), 0.0)
    step = Stride(1.0, 0.1, ground, after)
    assert (step.gain.mean, step.gain.error) == pytest.approx((1.0, 0.5 / math.sqrt(3)))
    assert step.accuracy_lost.mean == pytest.approx(0.25)
    unscored = Stride(1.0, 0.1, ground, Base(np.full(4, NAN), np.full(4, NAN), np.full(4, 5), 0.0))
    assert math.isnan(unscored.gain.mean) and math.isnan(unscored.accuracy_lost.mean)


@pytest.mark.parametrize(
    ("mean", "error", "told"),
    [
        (0.41666, 0.0312, "+0.42+-0.03"),
        (0.3294, 0.0288, "+0.329+-0.029"),
        (-172.54, 13.0, "-173+-13"),
        (126.0, 22.4, "+126+-22"),
        (0.0, 0.0, "+0"),
        (0.0, 1e-17, "+0"),
        (-0.4, 7.0, "+0+-7"),
        (-0.03, 1e-19, "-0.03"),
        (0.5, NAN, "+0.5"),
        (0.5, math.inf, "+0.5"),
        (NAN, 0.1, "-"),
    ],
)
def test_figures_are_shown_to_the_place_of_their_error(mean, error, told):
    assert shown(Figure(mean, error), signed=True) == told


def test_members_rewards_are_those_of_training():
    """Exactly rounded means; where something was not scored, of what differs from the others."""
    whole = rung(np.array([[0.1, 0.2, 0.3], [1, 2, 4], [1, 1, 1], [0, 0, 0]]))
    assert whole.of_members.tolist() == [math.fsum([0.1, 0.2, 0.3]) / 3, 7 / 3, 1, 0]
    hard = rung(np.array([[1.0, NAN], [0.9, 0.0], [1.0, 0.2], [1.0, 0.1]]))
    ranked = np.argsort(hard.of_members)
    assert ranked.tolist() == [1, 3, 0, 2], "who was not asked the hard prompt is not the best"
    assert hard.moves and not rung(np.tile([[1.0, 0.0], [0.0, 1.0]], (2, 1))).moves
    assert not rung(np.full((4, 2), NAN)).moves


def test_rounding_is_no_difference_where_something_is_unscored():
    """Members who get the same rewards in another order are equal, and nothing moves."""
    random = np.random.default_rng(1)
    for _ in range(50):
        own = random.integers(0, 10, 5) / 10
        found = rung(np.stack([np.append(random.permutation(own), NAN) for _ in range(6)]))
        assert not zscore(found.of_members).any() and not found.moves
