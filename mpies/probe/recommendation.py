"""Which sigma of a ladder, which alpha with it, and why.

**Sigma.** Of the steps that were tried on most prompts (steps.py), the one that gained most reward is the
best, and those within its standard error are taken for as good (the one-standard-error rule of Breiman,
Friedman, Olshen and Stone 1984, "Classification and regression trees", section 3.4.3). Of these, that whose
noise is nearest to one perturbation is taken, and of several the one that gained most: its sigma.

No step is tried, and no sigma taken, from the first rung on that is not bearable: where, by a standard error,
members are far worse than the unperturbed model or than at a smaller sigma (`symptoms.FAR`), or have lost
more than RIGHT_LOST of its right answers. A step that loses as many is not taken either, whatever its reward.

**alpha.** With which the noise that a run's T updates of N members leave is that of the step: T steps against
one have the same noise, and go about sqrt(N T / M) times as far along what members agree on. At equal answers
N T, alpha is then in proportion to N, as found in docs/results.md. No update goes farther than the step did,
since nothing is known beyond: where N / T is more than M, alpha is the step's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mpies.config import EsSettings
from mpies.errors import InputError
from mpies.es.symptoms import FAR, IDENTICAL
from mpies.measure.statistics import Figure, mean
from mpies.probe.rung import Base, Rung, Signal, Stride, jackknife, loses_most, shown, signal, surely
from mpies.probe.steps import alpha_of

# Standard errors above nothing, from which on the best of many steps is taken for more than chance.
SURE = 3


@dataclass(frozen=True)
class Tried:
    """What a rung comes to."""

    rung: Rung
    lost: Figure
    fallen: Figure
    """What it lacks of the best that is known at a smaller sigma, the unperturbed model or members."""
    accuracy_lost: Figure
    right: float
    """The unperturbed model's accuracy; NaN: not measured."""
    disagreement: Figure
    signal: Signal
    """With the prompts of a generation of the run."""
    to_noise_error: float
    """Of the signal to noise, over pairs."""
    steps: tuple[Stride, ...] = ()
    """That were tried, the shortest first."""

    @classmethod
    def of(cls, base: Base, rung: Rung, prompts: int, smaller: Sequence[Rung] = ()) -> Tried:
        """For a run with so many prompts in a generation. `smaller`: the rungs below."""
        lost = rung.lost(base)
        known = [one for one in (lost, *map(rung.lost_since, smaller)) if not math.isnan(one.mean)]
        return cls(
            rung,
            lost,
            max(known, key=surely, default=lost),
            rung.accuracy_lost(base),
            mean(base.accuracies),
            rung.disagreement,
            signal(rung, prompts),
            jackknife(lambda part: signal(part, prompts).to_noise, rung),
        )

    @property
    def bearable(self) -> bool:
        far = surely(self.fallen) > FAR * self.signal.spread
        return not (far or loses_most(self.accuracy_lost, self.right))

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        rung = self.rung
        return {
            "sigma": rung.sigma,
            "reward": mean(rung.rewards),
            "reward_lost": asdict(self.lost),
            "reward_fallen": asdict(self.fallen),
            "accuracy_lost": asdict(self.accuracy_lost),
            "disagreement": asdict(self.disagreement),
            "identical_pairs": rung.identical,
            "truncated": rung.truncated,
            "answer_tokens": mean(rung.tokens),
            "signal_to_noise": {"mean": self.signal.to_noise, "error": self.to_noise_error},
            "spread": self.signal.spread,
            "bearable": self.bearable,
            "rewards": rung.rewards.tolist(),
            "steps": [step.figures() for step in self.steps],
        }


@dataclass(frozen=True)
class Recommendation:
    sigma: float
    alpha: float
    reason: str
    length: float | None = None
    """Of the step that was chosen; None: none was."""
    by_answers: bool = False
    """Because no reward tells anything."""

    def chose(self, sigma: float, step: Stride) -> bool:
        return (sigma, step.length) == (self.sigma, self.length)

    def text(self) -> str:
        return f"es.sigma={self.sigma:g} es.alpha={self.alpha:g}: {self.reason}"


def worth_a_step(outcomes: Sequence[Tried]) -> list[Tried]:
    """Those below the first that is not bearable, with which something moves; of a ladder in rising order."""
    return [outcome for outcome in _bearable(outcomes) if outcome.rung.moves]


def recommend(es: EsSettings, outcomes: Sequence[Tried], repeated: bool = False) -> Recommendation:
    """Of a ladder in rising order, for a run with these settings. Raises InputError if nothing is known.

    `repeated`: steps were tried on the members' own prompts.
    """
    if all(math.isnan(outcome.disagreement.mean) for outcome in outcomes):
        raise InputError("of no pair both answers could be scored, so that nothing can be recommended")
    bearable = _bearable(outcomes)
    tried = _last_round(bearable)
    if tried:
        outcome, step = _choose(tried)
        own = ", tried on the members' own prompts," if repeated else ", tried,"
        why = _told(outcome, step, tried, own) + _ladder_told(outcomes, outcome, step)
        return _by_step(es, outcome, step, why)
    if not bearable:
        first = outcomes[0]
        why = f"the least there is, and even its members lose {_damage(first)}; try smaller ones by --sigmas"
        return _without_step(es, first, why)
    if steps := [(outcome, outcome.steps[0]) for outcome in bearable if outcome.steps]:
        why = "every step that was tried loses more than half of the right answers, or could not be scored"
        return _by_step(es, *steps[0], f"{why}; this is the shortest, try smaller sigmas by --sigmas")
    if any(outcome.disagreement.mean > 0 for outcome in bearable):
        outcome = max(bearable, key=lambda one: one.disagreement.mean)
        why = "the rewards of a pair's members are equal on average, so that no step moves anything; more"
        return _without_step(es, outcome, f"{why} --prompts tell members apart; here they differ most")
    outcome, why = _by_answers(bearable)
    return replace(_without_step(es, outcome, why), by_answers=True)


def alpha_for(sigma: float, es: EsSettings, members: int, length: float = 1.0) -> float:
    """That whose noise, in a whole run, is that of a step of so many members; the step's at most."""
    updates = max(es.generations, es.population / members)
    return float(f"{alpha_of(length, sigma, es.population, updates, es.fitness):.2g}")


def _ladder_told(outcomes: Sequence[Tried], outcome: Tried, step: Stride) -> str:
    """What members lose at this sigma of a ladder, and beyond; whether to move the ladder."""
    told = f"; members lose {_damage(outcome)}"
    beyond = next((one for one in outcomes if not one.bearable), None)
    if beyond:
        told += f", at {beyond.rung.sigma:g} {_damage(beyond)}"
    if outcome is outcomes[0] and step is outcome.steps[0]:
        return f"{told}; smaller sigmas may be better, try by --sigmas"
    if outcome is outcomes[-1] and step.length >= 1:
        return f"{told}; larger sigmas may be better, try by --sigmas"
    return told


def _by_step(es: EsSettings, outcome: Tried, step: Stride, why: str) -> Recommendation:
    members, sigma = len(outcome.rung.rewards), outcome.rung.sigma
    if es.population > es.generations * members:
        why += "; alpha is that of the step, beyond which nothing is known"
    else:
        why += f"; alpha so that {_run(es)} have the noise of this step"
    return Recommendation(sigma, alpha_for(sigma, es, members, step.length), why, step.length)


def _without_step(es: EsSettings, outcome: Tried, why: str) -> Recommendation:
    members, sigma = len(outcome.rung.rewards), outcome.rung.sigma
    told = f"{why}; alpha so that {_run(es)} have about the noise of one such perturbation, or less"
    return Recommendation(sigma, alpha_for(sigma, es, members), told)


def _run(es: EsSettings) -> str:
    return f"{es.generations} updates of {es.population} members"


def _bearable(outcomes: Sequence[Tried]) -> list[Tried]:
    return list(itertools.takewhile(lambda outcome: outcome.bearable, outcomes))


def _last_round(outcomes: Sequence[Tried]) -> list[tuple[Tried, Stride]]:
    """The steps that can be taken, of those that were tried on most prompts: all of them on the same.

    They were chosen by some of these prompts. But the best of them has gained no more than the best of all
    steps would have, had all been tried on as many.
    """
    tried = [(outcome, step) for outcome in outcomes for step in outcome.steps if step.bearable]
    most = max((len(step.after.rewards) for _, step in tried), default=0)
    return [one for one in tried if len(one[1].after.rewards) == most]


def _choose(tried: list[tuple[Tried, Stride]]) -> tuple[Tried, Stride]:
    """See the module's docstring."""
    best = max((step.gain for _, step in tried), key=lambda gain: gain.mean)
    alike = [one for one in tried if one[1].gain.mean >= surely(best)]
    return min(alike, key=lambda one: (abs(math.log(one[1].length)), -one[1].gain.mean))


def _told(outcome: Tried, step: Stride, tried: list[tuple[Tried, Stride]], where: str) -> str:
    told = (
        f"a step of these {len(outcome.rung.rewards)} members with alpha {step.alpha:.2g}{where} changes the"
        f" reward by {shown(step.gain, signed=True)}"
    )
    if all(one.gain.mean + SURE * one.gain.error < 0 for _, one in tried):
        return f"{told}; every step loses, try smaller sigmas by --sigmas"
    if any(one.gain.mean > SURE * one.gain.error for _, one in tried):
        return told
    return f"{told}; no step gains more than chance may, more --pairs and --prompts tell whether any does"


def _damage(outcome: Tried) -> str:
    fallen, lost = outcome.fallen.mean, outcome.accuracy_lost.mean
    told = f"{'-' if math.isnan(fallen) else f'{max(0.0, fallen):.2g}'} where they differ by"
    told = f"{told} {outcome.signal.spread:.2g}"
    if math.isnan(outcome.right):
        return told
    return f"{told} (accuracy {max(0.0, lost):.2g} of {outcome.right:.2g})"


def _by_answers(bearable: Sequence[Tried]) -> tuple[Tried, str]:
    """The smallest sigma at which most pairs answer differently, which rewards need to differ at all."""
    why = "no two rewards of a pair differ at any sigma that is bearable, so nothing can be learned"
    remedy = "a reward with steps in between, easier or more prompts tell members apart"
    for outcome in bearable:
        if outcome.rung.identical <= IDENTICAL:
            return outcome, f"{why} ({remedy}); chosen because most pairs answer differently from there on"
    return bearable[-1], f"{why}, and most pairs answer alike even at the largest; try larger ones"
