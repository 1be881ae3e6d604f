"""Which sigma is recommended, and that there is always an answer with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.probe.recommendation import Tried, alpha_for, recommend
from mpies.probe.rung import Base, Rung

ES = config.load(["model.path=x", "es.population=32", "es.generations=16", "run.directory=x"]).es
PROMPTS = 20
NOTHING_LOST = {"lost": -1.0, "accuracy_lost": -1.0, "net": 9.0}
LADDER = (0.001, 0.002, 0.004, 0.008, 0.016)


@dataclass
class World:
    """A made-up model: what its members answer at a sigma. Rewards are 0 or 1."""

    right: float = 0.5
    slope: float = 20.0
    """Of the logit, for the pair's own part."""
    noise: float = 60.0
    """The same, for each prompt."""
    damage: float = 0.0

    def base(self) -> Base:
        rewards = (self._ease() > 0).astype(float)
        return Base(rewards, rewards, np.full(PROMPTS, 5), 0.0)

    def rung(self, sigma: float, pairs: int = 24) -> Rung:
        random = np.random.default_rng(2)
        own = self.slope * random.standard_normal((pairs, 1))
        own = own + self.noise * random.standard_normal((pairs, PROMPTS))
        signed = np.stack([own, -own], axis=1).reshape(2 * pairs, PROMPTS)
        logits = self._ease() + sigma * signed - self.damage * sigma**2
        rewards = (logits > 0).astype(float)
        marks = np.round(4 * logits).astype(int)
        return Rung(sigma, rewards, rewards, marks, np.full(rewards.shape, 5), 0.0)

    def outcomes(self, ladder=LADDER, prompts: int = PROMPTS) -> list[Tried]:
        return [Tried.of(ES, self.base(), self.rung(sigma), prompts) for sigma in ladder]

    def _ease(self) -> np.ndarray:
        return np.linspace(-1, 1, PROMPTS) + 2 * (self.right - 0.5)


def test_without_damage_the_largest_nets_most():
    found = recommend(ES, World().outcomes())
    assert found.sigma == LADDER[-1] and "larger ones may be better" in found.reason
    assert found.alpha == pytest.approx(LADDER[-1] * math.sqrt(2), rel=0.05) and not found.by_answers
    assert found.text().startswith(f"es.sigma={LADDER[-1]:g} es.alpha=") and "\n" not in found.text()


def test_what_a_run_nets():
    """Of T = 16 generations of N = 32 members: T sqrt(N / T) steps of alpha = sigma, less the loss."""
    world = World(damage=2e4)
    for found in world.outcomes():
        lost = world.base().rewards.mean() - found.rung.rewards.mean()
        assert found.net.mean == pytest.approx(16 * math.sqrt(32 / 16) * found.signal.gain - lost)
        assert found.net.error > 0 or found.signal.gain == 0


def test_damage_ends_the_ladder():
    found = World(damage=2e4).outcomes()
    bearable = [outcome.bearable for outcome in found]
    assert bearable == sorted(bearable, reverse=True) and not bearable[-1] and bearable[1]
    first = bearable.index(False)
    chosen = recommend(ES, found)
    assert chosen.sigma == max(found[:first], key=lambda outcome: outcome.net.mean).rung.sigma
    assert f", at {LADDER[first]:g} " in chosen.reason and "a run nets most there" in chosen.reason


def test_what_lies_beyond_the_first_that_is_not_bearable_is_not_looked_at():
    """Where all rewards are 0, there is nothing to lose any more."""
    outcomes = World(damage=2e4).outcomes()
    assert not outcomes[-2].bearable
    better = {name: replace(getattr(outcomes[-1], name), mean=value) for name, value in NOTHING_LOST.items()}
    last = replace(outcomes[-1], signal=outcomes[1].signal, **better)
    assert last.bearable and last.signal.gain > 0 and recommend(ES, [*outcomes[:-1], last]).sigma < LADDER[-2]


def test_a_reward_that_rises_as_right_answers_are_lost():
    """As where only brevity is asked for: a model that is damaged enough says nothing."""
    world = World(damage=2e4)
    found = []
    for outcome in world.outcomes():
        rung = replace(outcome.rung, rewards=0.1 * outcome.rung.rewards - outcome.rung.accuracies)
        found.append(Tried.of(ES, replace(world.base(), rewards=-0.9 * world.base().rewards), rung, PROMPTS))
    assert max(outcome.lost.mean for outcome in found) < 0.05, "nothing is lost of the reward"
    bearable = [outcome.bearable for outcome in found]
    lost = [outcome.accuracy_lost.mean - outcome.accuracy_lost.error for outcome in found]
    assert bearable == [share <= 0.25 for share in lost] and not bearable[-1] and bearable[0]
    assert "(accuracy " in recommend(ES, found).reason


def test_if_none_is_bearable_it_is_the_least():
    found = recommend(ES, World(damage=1e8).outcomes())
    assert found.sigma == LADDER[0] and "even its members lose" in found.reason


def test_all_rewards_are_zero():
    """By answers alone: a reward that nobody gets says nothing about sigma."""
    found = recommend(ES, World(right=-20, noise=200).outcomes())
    assert found.by_answers and "no two rewards of a pair differ" in found.reason
    identical = [outcome.rung.identical for outcome in World(right=-20, noise=200).outcomes()]
    assert found.sigma == LADDER[next(i for i, share in enumerate(identical) if share <= 0.5)] < LADDER[-1]
    stiff = recommend(ES, World(right=-20, slope=0, noise=0).outcomes())
    assert stiff.sigma == LADDER[-1] and "try larger ones" in stiff.reason


def test_a_net_that_may_be_chance_is_told():
    (best,) = World().outcomes(LADDER[-1:])
    for error, told in ((best.net.mean / 3, False), (best.net.mean, True)):
        found = recommend(ES, [replace(best, net=replace(best.net, error=error))])
        assert ("may be chance" in found.reason) == told


def test_nothing_but_noise():
    outcomes = [replace(o, signal=replace(o.signal, step=-0.1)) for o in World().outcomes()]
    found = recommend(ES, outcomes)
    assert "no signal is seen above the noise" in found.reason and found.sigma == LADDER[-1]


def test_nothing_was_scored():
    world = World()
    unknown = np.full(PROMPTS, math.nan)
    rungs = [world.rung(sigma) for sigma in LADDER]
    rungs = [replace(rung, rewards=np.full(rung.rewards.shape, math.nan)) for rung in rungs]
    base = Base(unknown, unknown, np.full(PROMPTS, 5), 0.0)
    with pytest.raises(InputError, match=r"^no answer of any member could be scored"):
        recommend(ES, [Tried.of(ES, base, rung, PROMPTS) for rung in rungs])


def test_alpha_is_what_a_run_of_that_length_can_bear():
    """Twice the members and half of the generations: twice alpha; see docs/results.md."""
    many = replace_es(population=64, generations=8)
    assert alpha_for(0.01, ES) == 0.014 and alpha_for(0.01, many) == 0.028
    assert alpha_for(0.01, replace_es(generations=1)) == alpha_for(0.01, replace_es(generations=4)) == 0.028
    assert alpha_for(0.01, replace_es(fitness="centered_rank")) == 0.049, "whose steps are shorter"


def replace_es(**changes) -> config.EsSettings:
    given = [f"es.{key}={value}" for key, value in {"population": 32, "generations": 16, **changes}.items()]
    return config.load(["model.path=x", "run.directory=x", *given]).es
