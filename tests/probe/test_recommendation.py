"""Which sigma is recommended, and that there is always an answer with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.probe.recommendation import Tried, alpha_for, recommend, worth_a_step
from mpies.probe.rung import Base, Rung, Stride
from mpies.probe.steps import LENGTHS, alpha_of, better_half

ES = config.load(["model.path=x", "es.population=32", "es.generations=16", "run.directory=x"]).es
PROMPTS = 20
PAIRS = 24
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
    reach: float = 0.02
    """Alpha of a step that gains `height`; twice as much gains nothing."""
    height: float = 0.4
    doubt: float = 0.05
    """Standard error of what a step gains."""

    def base(self) -> Base:
        rewards = (self._ease() > 0).astype(float)
        return Base(rewards, rewards, np.full(PROMPTS, 5), 0.0)

    def rung(self, sigma: float) -> Rung:
        random = np.random.default_rng(2)
        own = self.slope * random.standard_normal((PAIRS, 1))
        own = own + self.noise * random.standard_normal((PAIRS, PROMPTS))
        signed = np.stack([own, -own], axis=1).reshape(2 * PAIRS, PROMPTS)
        logits = self._ease() + sigma * signed - self.damage * sigma**2
        rewards = (logits > 0).astype(float)
        marks = np.round(4 * logits).astype(int)
        return Rung(sigma, rewards, rewards, marks, np.full(rewards.shape, 5), 0.0)

    def outcomes(self, ladder=LADDER) -> list[Tried]:
        found = [Tried.of(self.base(), self.rung(sigma), PROMPTS) for sigma in ladder]
        worth = worth_a_step(found)
        return [replace(one, steps=self.steps(one.rung.sigma)) if one in worth else one for one in found]

    def steps(self, sigma: float) -> tuple[Stride, ...]:
        alphas = {length: alpha_of(length, sigma, 2 * PAIRS, 1, "zscore") for length in LENGTHS}
        return tuple(self.step(length, sigma, alpha) for length, alpha in alphas.items())

    def step(self, length: float, sigma: float, alpha: float) -> Stride:
        """The gain is a parabola in alpha; its scatter over prompts is each step's own."""
        random = np.random.default_rng(round(1e9 * alpha * sigma))
        scatter = random.standard_normal(PROMPTS)
        scatter = self.doubt * math.sqrt(PROMPTS) * (scatter - scatter.mean()) / scatter.std(ddof=1)
        gain = self.height * (1 - (alpha / self.reach - 1) ** 2)
        ground = self.base()
        return Stride(length, alpha, ground, replace(ground, rewards=ground.rewards + gain + scatter))

    def _ease(self) -> np.ndarray:
        return np.linspace(-1, 1, PROMPTS) + 2 * (self.right - 0.5)


def chosen(outcomes: list[Tried], sigma: float, length: float) -> Stride:
    (steps,) = (outcome.steps for outcome in outcomes if outcome.rung.sigma == sigma)
    return next(step for step in steps if step.length == length)


def test_the_step_that_gains_most_says_how_far():
    """Whatever the sigma: steps of the same alpha gain the same here, so the noise decides between them."""
    for reach in (0.005, 0.02, 0.08):
        outcomes = World(reach=reach, doubt=0.01).outcomes()
        found = recommend(ES, outcomes)
        step = chosen(outcomes, found.sigma, found.length)
        assert 0.65 * reach < step.alpha < 1.45 * reach
        assert found.length == 1 or found.sigma in (LADDER[0], LADDER[-1]), "as near as the ladder has it"
        # T updates of N members leave the noise of one step of M members.
        assert found.alpha * math.sqrt(16 / 32) == pytest.approx(step.alpha / math.sqrt(2 * PAIRS), rel=0.05)
        assert f"alpha {step.alpha:.2g}, tried, changes the reward by +" in found.reason
        assert found.text().startswith(f"es.sigma={found.sigma:g} es.alpha=") and "\n" not in found.text()


def test_a_reach_beyond_the_ladder():
    long = recommend(ES, World(reach=1.0, doubt=0.01).outcomes())
    assert (long.sigma, long.length) == (LADDER[-1], LENGTHS[-1])
    assert "larger sigmas may be better" in long.reason
    short = recommend(ES, World(reach=0.0015, doubt=0.001).outcomes())
    assert (short.sigma, short.length) == (LADDER[0], LENGTHS[0])
    assert short.alpha == pytest.approx(LADDER[0] * math.sqrt(2) / 4, rel=0.05)
    assert "smaller sigmas may be better" in short.reason


def test_steps_that_doubt_does_not_tell_apart_are_taken_for_as_good():
    """Then one whose noise is a perturbation's is taken, of the sigma that gained most with it."""
    outcomes = World(reach=0.01, doubt=0.5).outcomes()
    found = recommend(ES, outcomes)
    assert found.length == 1 and "no step gains more than chance may, more --pairs" in found.reason
    gains = {outcome.rung.sigma: outcome.steps[2].gain.mean for outcome in outcomes if outcome.steps}
    assert found.sigma == max(gains, key=gains.__getitem__)
    sure = World(reach=0.03, height=0.1, doubt=0.01).steps(LADDER[-1])
    found = recommend(ES, [*outcomes[:-1], replace(outcomes[-1], steps=sure)])
    assert "chance" not in found.reason, "one of them surely gains something"
    assert "chance" not in recommend(ES, World(reach=0.01, doubt=0.1).outcomes()).reason


def test_damage_ends_the_ladder():
    found = World(damage=2e4, reach=1.0).outcomes()
    bearable = [outcome.bearable for outcome in found]
    assert bearable == sorted(bearable, reverse=True) and not bearable[-1] and bearable[1]
    first = bearable.index(False)
    assert [bool(outcome.steps) for outcome in found] == bearable, "nothing is tried there"
    recommended = recommend(ES, found)
    assert recommended.sigma == LADDER[first - 1] and f", at {LADDER[first]:g} " in recommended.reason


def test_what_lies_beyond_the_first_that_is_not_bearable_is_not_looked_at():
    """Where all rewards are 0, there is nothing to lose any more."""
    outcomes = World(damage=2e4).outcomes()
    assert not outcomes[-2].bearable
    nothing = {name: replace(getattr(outcomes[-1], name), mean=-1.0) for name in ("fallen", "accuracy_lost")}
    last = replace(outcomes[-1], signal=outcomes[1].signal, steps=World(height=9.0).steps(0.016), **nothing)
    assert last.bearable and last not in worth_a_step([*outcomes[:-1], last])
    assert recommend(ES, [*outcomes[:-1], last]).sigma < LADDER[-2]


def test_members_that_are_far_worse_than_others_at_a_smaller_sigma():
    """Where the unperturbed model gets nothing, and hardly any noise is better, there is nothing to lose."""
    world = World(damage=2e4)
    poor = replace(world.base(), rewards=np.zeros(PROMPTS), accuracies=np.full(PROMPTS, math.nan))
    rungs = [world.rung(sigma) for sigma in LADDER]
    assert all(Tried.of(poor, rung, PROMPTS).bearable for rung in rungs)
    found = [Tried.of(poor, rung, PROMPTS, rungs[:at]) for at, rung in enumerate(rungs)]
    assert [one.bearable for one in found] == [one.bearable for one in world.outcomes()]
    assert not found[-1].bearable and found[-1].lost.mean <= 0 < found[-1].fallen.mean


def test_a_reward_that_rises_as_right_answers_are_lost():
    """As where only brevity is asked for: a model that is damaged enough says nothing."""
    world = World(damage=2e4)
    found = []
    for sigma in LADDER:
        rung = world.rung(sigma)
        rung = replace(rung, rewards=0.1 * rung.rewards - rung.accuracies)
        outcome = Tried.of(replace(world.base(), rewards=-0.9 * world.base().rewards), rung, PROMPTS)
        found.append(replace(outcome, steps=world.steps(sigma)))
    assert max(outcome.lost.mean for outcome in found) < 0.05, "nothing is lost of the reward"
    bearable = [outcome.bearable for outcome in found]
    lost = [outcome.accuracy_lost.mean - outcome.accuracy_lost.error for outcome in found]
    assert bearable == [share <= 0.25 for share in lost] and not bearable[-1] and bearable[0]
    assert "(accuracy " in recommend(ES, found).reason


def test_no_step_is_taken_that_loses_most_right_answers():
    """Whatever its reward."""
    outcomes = World(doubt=0.01).outcomes()
    best = recommend(ES, outcomes)
    ruined = [
        replace(one, steps=tuple(ruin(step) if step.alpha > 0.01 else step for step in one.steps))
        for one in outcomes
    ]
    found = recommend(ES, ruined)
    assert chosen(outcomes, best.sigma, best.length).alpha > 0.01
    assert chosen(ruined, found.sigma, found.length).alpha <= 0.01
    none = [replace(one, steps=tuple(map(ruin, one.steps))) for one in outcomes]
    least = recommend(ES, none)
    assert (least.sigma, least.length) == (LADDER[0], LENGTHS[0]), "the shortest of all"
    assert "every step that was tried loses more than half of the right answers" in least.reason


def test_right_answers_are_those_to_the_steps_own_prompts():
    """Which may be harder than the members'."""
    few = np.repeat([1.0, 0.0], [PROMPTS // 4, 3 * PROMPTS // 4])
    (outcome,) = World(doubt=0.01).outcomes([0.004])
    steps = []
    for step in outcome.steps:
        ground = replace(step.ground, accuracies=few)
        steps.append(ruin(replace(step, ground=ground)) if step.length >= 1 else replace(step, ground=ground))
    assert outcome.right > 0.4 and not steps[-1].bearable
    found = recommend(ES, [replace(outcome, steps=tuple(steps))])
    assert found.length is not None and found.length < 1


def ruin(step: Stride) -> Stride:
    return replace(step, after=replace(step.after, accuracies=np.zeros(PROMPTS)))


def test_if_none_is_bearable_it_is_the_least():
    found = recommend(ES, World(damage=1e8).outcomes())
    assert found.sigma == LADDER[0] and "even its members lose" in found.reason


def test_all_rewards_are_zero():
    """By answers alone: a reward that nobody gets says nothing about sigma."""
    outcomes = World(right=-20, noise=200).outcomes()
    assert not any(outcome.steps for outcome in outcomes), "a step of equal rewards moves nothing"
    found = recommend(ES, outcomes)
    assert found.by_answers and "no two rewards of a pair differ" in found.reason
    identical = [outcome.rung.identical for outcome in outcomes]
    assert found.sigma == LADDER[next(i for i, share in enumerate(identical) if share <= 0.5)] < LADDER[-1]
    stiff = recommend(ES, World(right=-20, slope=0, noise=0).outcomes())
    assert stiff.sigma == LADDER[-1] and "try larger ones" in stiff.reason


def test_nothing_was_scored():
    world = World()
    unknown = np.full(PROMPTS, math.nan)
    rungs = [world.rung(sigma) for sigma in LADDER]
    rungs = [replace(rung, rewards=np.full(rung.rewards.shape, math.nan)) for rung in rungs]
    base = Base(unknown, unknown, np.full(PROMPTS, 5), 0.0)
    with pytest.raises(InputError, match=r"^of no pair both answers could be scored"):
        recommend(ES, [Tried.of(base, rung, PROMPTS) for rung in rungs])


def test_an_unscored_step_is_not_taken():
    (outcome,) = World(doubt=0.01).outcomes([0.004])
    unknown = np.full(PROMPTS, math.nan)
    steps = [replace(one, after=replace(one.after, rewards=unknown)) for one in outcome.steps[:-1]]
    found = recommend(ES, [replace(outcome, steps=(*steps, outcome.steps[-1]))])
    assert found.length == LENGTHS[-1]


def test_a_step_that_was_left_behind_is_better_than_one_that_ruins():
    """Where more prompts showed that all which were kept lose most right answers."""
    (outcome,) = World(doubt=0.01).outcomes([0.004])
    short, *others = outcome.steps
    late = [ruin(step).joined(ruin(step)) for step in others]
    found = recommend(ES, [replace(outcome, steps=(short, *late))])
    assert found.length == short.length and "every step" not in found.reason


def test_where_every_step_loses():
    outcomes = World(height=-0.4, doubt=0.01, reach=0.001).outcomes()
    lost = [replace(one, steps=tuple(worse(step) for step in one.steps)) for one in outcomes]
    found = recommend(ES, lost)
    assert "every step loses, try smaller sigmas" in found.reason and "chance" not in found.reason


def worse(step: Stride) -> Stride:
    return replace(step, after=replace(step.after, rewards=step.ground.rewards - 0.1))


def test_what_is_unknown_of_the_unperturbed_model_hides_nothing():
    """Members that fall far below others are too far, whether or not its own answers could be scored."""
    world = World(damage=2e4)
    unknown = replace(world.base(), rewards=np.full(PROMPTS, math.nan))
    rungs = [world.rung(sigma) for sigma in LADDER]
    found = [Tried.of(unknown, rung, PROMPTS, rungs[:at]) for at, rung in enumerate(rungs)]
    assert found[0].bearable and not found[-1].bearable


def test_the_better_half():
    """Of steps that can be taken, before any other."""
    (outcome,) = World(doubt=0.01).outcomes([0.004])
    steps = {(0, step.length): step for step in outcome.steps}
    gains = sorted(steps, key=lambda piece: -steps[piece].gain.mean)
    assert better_half(steps, list(steps)) == [piece for piece in steps if piece in gains[:3]]
    ruined = steps | {gains[0]: ruin(steps[gains[0]])}
    assert better_half(ruined, list(steps)) == [piece for piece in steps if piece in gains[1:4]]


def test_steps_of_the_last_round_are_compared():
    """Others were tried on fewer prompts, and left behind, however much they seemed to gain."""
    outcomes = World(doubt=0.01).outcomes()
    best = recommend(ES, outcomes)
    later = []
    for outcome in outcomes:
        steps = [
            step if (outcome.rung.sigma, step.length) == (best.sigma, best.length) else step.joined(step)
            for step in outcome.steps
        ]
        later.append(replace(outcome, steps=tuple(steps)))
    found = recommend(ES, later)
    assert (found.sigma, found.length) != (best.sigma, best.length)
    assert len(chosen(later, found.sigma, found.length).after.rewards) == 2 * PROMPTS


def test_rewards_that_are_equal_on_average_move_nothing():
    """Where one of a pair gets what the other gets for another prompt: they disagree, no step is tried."""
    rewards = np.tile([[1.0, 0.0], [0.0, 1.0]], (4, 1))
    base = Base(np.array([0.5, 0.5]), np.full(2, math.nan), np.full(2, 5), 0.0)
    rung = Rung(0.1, rewards, np.full((8, 2), math.nan), np.arange(16).reshape(8, 2), np.full((8, 2), 5), 0.0)
    outcomes = [Tried.of(base, rung, 2)]
    assert worth_a_step(outcomes) == []
    found = recommend(ES, outcomes)
    assert "no step moves anything" in found.reason and found.length is None and not found.by_answers


def test_alpha_is_what_a_run_of_that_length_can_bear():
    """Twice the members and half of the generations: twice alpha; see docs/results.md."""
    many = replace_es(population=64, generations=8)
    assert alpha_for(0.01, ES, 16) == 0.014 and alpha_for(0.01, many, 16) == 0.028
    assert alpha_for(0.01, replace_es(fitness="centered_rank"), 16) == 0.049, "whose steps are shorter"
    assert alpha_for(0.01, ES, 16, 1 / 2) == 0.0071, "half as much noise"


@pytest.mark.parametrize("few", [0, 1, 2])
def test_no_update_goes_farther_than_the_step(few):
    """Of 16 members with alpha 0.04, at length 1: what a longer one does nobody has seen."""
    assert alpha_of(1.0, 0.01, 16, 1, "zscore") == 0.04
    assert alpha_for(0.01, replace_es(population=64, generations=few), 16) == 0.04
    outcomes = World(doubt=0.01).outcomes()
    found = recommend(replace_es(population=256, generations=few), outcomes)
    assert found.alpha == pytest.approx(chosen(outcomes, found.sigma, found.length).alpha, rel=0.05)
    assert "alpha is that of the step" in found.reason


def replace_es(**changes) -> config.EsSettings:
    given = [f"es.{key}={value}" for key, value in {"population": 32, "generations": 16, **changes}.items()]
    return config.load(["model.path=x", "run.directory=x", *given]).es
