"""Which sigma of a ladder, which alpha with it, and why.

**Sigma.** Of the steps that were tried (steps.py), the one that gained most reward is the best, and those
within its standard error are taken for as good (the one-standard-error rule of Breiman, Friedman, Olshen
and Stone 1984, "Classification and regression trees", section 3.4.3). Of these, that whose noise is nearest
to one perturbation is taken, and of several the one that gained most: its sigma.

No step is tried, and no sigma taken, from the first rung on that is not bearable: where, by a standard error,
members are far worse than the unperturbed model (`symptoms.FAR`), or have lost more than RIGHT_LOST of its
right answers. A step that loses as many is not taken either, whatever its reward.

**alpha.** With which the noise that a run's T updates of N members leave is that of the step: T steps against
one have the same noise, and go sqrt(N T / M) times as far along what members agree on. At equal answers N T,
alpha is then in proportion to N, as found in docs/results.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpies.config import EsSettings
from mpies.errors import InputError
from mpies.es.symptoms import FAR, IDENTICAL
from mpies.measure.statistics import Figure, mean
from mpies.probe.rung import Base, Rung, Signal, Step, jackknife, signal
from mpies.probe.steps import alpha_of

# Standard errors above nothing, from which on the best of many steps is taken for more than chance.
SURE = 3

# Generations that alpha is spread over at least: a single step's noise is half of the tried one's.
FEWEST = 4

# Of the unperturbed model's right answers, that members or steps may lose: a reward may rise while they do.
RIGHT_LOST = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a rung comes to."""

    rung: Rung
    lost: Figure
    accuracy_lost: Figure
    right: float
    """The unperturbed model's accuracy; NaN: not measured."""
    disagreement: Figure
    signal: Signal
    """With the prompts of a generation of the run."""
    to_noise_error: float
    """Of the signal to noise, over pairs."""
    steps: tuple[Step, ...] = ()
    """That were tried, the shortest first."""

    @classmethod
    def of(cls, base: Base, rung: Rung, prompts: int) -> Outcome:
        """For a run with so many prompts in a generation."""
        return cls(
            rung,
            rung.lost(base),
            rung.accuracy_lost(base),
            mean(base.accuracies),
            rung.disagreement,
            signal(rung, prompts),
            jackknife(lambda part: signal(part, prompts).to_noise, rung),
        )

    @property
    def bearable(self) -> bool:
        far = _surely(self.lost) > FAR * self.signal.spread
        return not (far or _surely(self.accuracy_lost) > RIGHT_LOST * self.right)

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        rung = self.rung
        return {
            "sigma": rung.sigma,
            "reward": mean(rung.rewards),
            "reward_lost": asdict(self.lost),
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
    length: float = 1.0
    """Of the step that was chosen; 1 where none was."""
    by_answers: bool = False
    """Because no reward tells anything."""

    def text(self) -> str:
        return f"es.sigma={self.sigma:g} es.alpha={self.alpha:g}: {self.reason}"


def worth_a_step(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those below the first that is not bearable, where members differ; of a ladder in rising order."""
    return [outcome for outcome in _bearable(outcomes) if outcome.disagreement.mean > 0]


def recommend(es: EsSettings, outcomes: Sequence[Outcome]) -> Recommendation:
    """Of a ladder in rising order, for a run with these settings. Raises InputError if nothing is known."""
    if all(math.isnan(outcome.disagreement.mean) for outcome in outcomes):
        raise InputError("no answer of any member could be scored, so that nothing can be recommended")
    bearable = _bearable(outcomes)
    beyond = outcomes[len(bearable)] if len(bearable) < len(outcomes) else None
    chosen = _best_step(bearable)
    if chosen:
        outcome, step = chosen
        why = f"{_gained(outcome, step)}, and members lose {_damage(outcome)}"
        why += f", at {beyond.rung.sigma:g} {_damage(beyond)}" if beyond else ""
        why += "; larger ones may be better, try by --sigmas" if outcome is outcomes[-1] else ""
        return _recommended(es, outcome, why, step.length)
    if not bearable:
        first = outcomes[0]
        why = f"the least there is, and even its members lose {_damage(first)}; try smaller ones by --sigmas"
        return _recommended(es, first, why)
    if worth_a_step(bearable):
        outcome = max(bearable, key=lambda one: one.disagreement.mean)
        why = (
            "no step could be scored, or none left half of the right answers; there, most rewards of pairs"
            f" differ ({100 * outcome.disagreement.mean:.0f} %)"
        )
        return _recommended(es, outcome, why)
    outcome, why = _by_answers(bearable)
    return _recommended(es, outcome, why, by_answers=True)


def alpha_for(sigma: float, es: EsSettings, length: float = 1.0) -> float:
    """That whose noise, in a whole run, is `length` perturbations; to two digits. At least FEWEST updates."""
    alpha = alpha_of(length, sigma, es.population, max(es.generations, FEWEST), es.fitness)
    return float(f"{alpha:.2g}")


def _recommended(
    es: EsSettings, outcome: Outcome, why: str, length: float | None = None, by_answers: bool = False
) -> Recommendation:
    sigma = outcome.rung.sigma
    noise = "about that of one such perturbation" if length is None else "that of this step"
    told = (
        f"{why}; alpha so that the noise that {es.generations} updates of {es.population} members leave in"
        f" the weights is {noise}"
    )
    length = 1.0 if length is None else length
    return Recommendation(sigma, alpha_for(sigma, es, length), told, length, by_answers)


def _bearable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return list(itertools.takewhile(lambda outcome: outcome.bearable, outcomes))


def _best_step(outcomes: Sequence[Outcome]) -> tuple[Outcome, Step] | None:
    """See the module's docstring; None if there is no step that can be taken."""
    tried = [
        (outcome, step)
        for outcome in outcomes
        for step in outcome.steps
        if math.isfinite(step.gain.mean) and not _surely(step.accuracy_lost) > RIGHT_LOST * outcome.right
    ]
    if not tried:
        return None
    best = max((step.gain for _, step in tried), key=lambda gain: gain.mean)
    alike = [one for one in tried if one[1].gain.mean >= _surely(best)]
    return min(alike, key=lambda one: (abs(math.log(one[1].length)), -one[1].gain.mean))


def _gained(outcome: Outcome, step: Step) -> str:
    gain = step.gain
    error = f" +- {gain.error:.1g}" if math.isfinite(gain.error) else ""
    told = (
        f"a step of these {len(outcome.rung.rewards)} members with alpha {step.alpha:.2g}, tried, changes the"
        f" reward by {gain.mean:+.2g}{error}"
    )
    if gain.mean > SURE * gain.error:
        return told
    return f"{told}, which may be chance: perhaps nothing is learned in this way"


def _surely(figure: Figure) -> float:
    """A standard error less; NaN where nothing is known, which is more than nothing."""
    return figure.mean - (figure.error if math.isfinite(figure.error) else 0.0)


def _damage(outcome: Outcome) -> str:
    told = f"{max(0.0, outcome.lost.mean):.2g} where they differ by {outcome.signal.spread:.2g}"
    if math.isnan(outcome.right):
        return told
    return f"{told} (accuracy {max(0.0, outcome.accuracy_lost.mean):.2g} of {outcome.right:.2g})"


def _by_answers(bearable: Sequence[Outcome]) -> tuple[Outcome, str]:
    """The smallest sigma at which most pairs answer differently, which rewards need to differ at all."""
    why = "no two rewards of a pair differ at any sigma that is bearable, so nothing can be learned"
    remedy = "a reward with steps in between, easier or more prompts tell members apart"
    for outcome in bearable:
        if outcome.rung.identical <= IDENTICAL:
            return outcome, f"{why} ({remedy}); chosen because most pairs answer differently from there on"
    return bearable[-1], f"{why}, and most pairs answer alike even at the largest; try larger ones"
