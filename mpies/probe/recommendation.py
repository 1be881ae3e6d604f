"""Which sigma of a ladder, which alpha with it, and why.

**alpha.** After T generations of N members, the noise of the updates has moved each weight by a random amount
of standard deviation alpha sqrt(T / N), as the squares of independent steps add up. With alpha = sigma
sqrt(N / T) that is as much as one perturbation, of which the ladder says what it costs. At equal answers N T,
alpha is then in proportion to N, as found in docs/results.md.

**sigma.** Members lose in proportion to sigma^2 and differ in proportion to sigma, so steps are worth the
more the larger sigma is, until members are damaged more than they tell. With that alpha, T steps gain T
(alpha / sigma) `Signal.gain`, as far as the reward is linear, and their noise costs what a perturbation
costs. The sigma with the largest difference is taken, of those below the first that is not bearable: where,
by a standard error, members are far worse than the unperturbed model (`symptoms.FAR`), or have lost more than
RIGHT_LOST of its right answers. There, linear is no word for it.
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
from mpies.probe.rung import Base, Rung, Signal, jackknife, signal

# Standard errors above nothing, from which on a net is more than chance.
SURE = 2

# Generations that alpha is spread over at least: a single step is no larger than sigma sqrt(N) / 2.
FEWEST = 4

# Of the unperturbed model's right answers, that members may lose: a reward may rise while they do.
RIGHT_LOST = 0.5

# Standard deviation of a generation's fitness values, which steps are in proportion to.
FITNESS_SPREAD = {"zscore": 1.0, "centered_rank": 1 / math.sqrt(12)}


@dataclass(frozen=True)
class Tried:
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
    net: Figure
    """What a whole run would gain, as far as the reward is linear, less what its noise costs."""

    @classmethod
    def of(cls, es: EsSettings, base: Base, rung: Rung, prompts: int) -> Tried:
        """For a run with these settings and so many prompts in a generation."""
        steps = es.generations * _alpha_over_sigma(es)

        def net(part: Rung) -> float:
            return steps * signal(part, prompts).gain - part.lost(base).mean

        return cls(
            rung,
            rung.lost(base),
            rung.accuracy_lost(base),
            mean(base.accuracies),
            rung.disagreement,
            signal(rung, prompts),
            jackknife(lambda part: signal(part, prompts).to_noise, rung),
            Figure(net(rung), jackknife(net, rung)),
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
            "gain": self.signal.gain,
            "net": asdict(self.net),
            "spread": self.signal.spread,
            "bearable": self.bearable,
            "rewards": rung.rewards.tolist(),
        }


@dataclass(frozen=True)
class Recommendation:
    sigma: float
    alpha: float
    reason: str
    by_answers: bool = False
    """Because no reward tells anything."""

    def text(self) -> str:
        return f"es.sigma={self.sigma:g} es.alpha={self.alpha:g}: {self.reason}"


def recommend(es: EsSettings, outcomes: Sequence[Tried]) -> Recommendation:
    """Of a ladder in rising order, for a run with these settings."""
    chosen, reason, by_answers = _choose(outcomes)
    sigma = chosen.rung.sigma
    return Recommendation(sigma, alpha_for(sigma, es), f"{reason}; {_alpha_told(es)}", by_answers)


def alpha_for(sigma: float, es: EsSettings) -> float:
    """sigma sqrt(N / T), T at least FEWEST, over the spread of the fitness values; to two digits."""
    return float(f"{sigma * _alpha_over_sigma(es) / FITNESS_SPREAD[es.fitness]:.2g}")


def _alpha_over_sigma(es: EsSettings) -> float:
    """For fitness values with a standard deviation of 1."""
    return math.sqrt(es.population / max(es.generations, FEWEST))


def _alpha_told(es: EsSettings) -> str:
    return (
        f"alpha so that the noise that {es.generations} updates of {es.population} members leave in the"
        " weights is about one such perturbation"
    )


def _choose(outcomes: Sequence[Tried]) -> tuple[Tried, str, bool]:
    """The rung, why, and whether by answers alone."""
    if all(math.isnan(outcome.disagreement.mean) for outcome in outcomes):
        raise InputError("no answer of any member could be scored, so that nothing can be recommended")
    bearable = list(itertools.takewhile(lambda outcome: outcome.bearable, outcomes))
    if not bearable:
        first = outcomes[0]
        return (
            first,
            f"the least there is, and even its members lose {_damage(first)}; try smaller ones by --sigmas",
            False,
        )
    if not any(outcome.disagreement.mean > 0 for outcome in bearable):
        return _by_answers(bearable)
    beyond = outcomes[len(bearable)] if len(bearable) < len(outcomes) else None
    telling = [outcome for outcome in bearable if outcome.signal.gain > 0]
    if telling:
        best = max(telling, key=lambda outcome: outcome.net.mean)
    else:
        best = max(bearable, key=lambda outcome: outcome.disagreement.mean)
    return best, _why(best, beyond, best is outcomes[-1]), False


def _why(best: Tried, beyond: Tried | None, last: bool) -> str:
    if best.signal.gain > 0:
        error = f" +- {best.net.error:.1g}" if math.isfinite(best.net.error) else ""
        why = f"a run nets most there ({best.net.mean:.2g}{error}, if the reward were linear)"
        if not best.net.mean > SURE * best.net.error:
            why += ", which may be chance: a smaller one may be better, more --pairs and --prompts tell"
    else:
        why = (
            "no signal is seen above the noise of so few pairs and prompts; there, most rewards of pairs"
            f" differ ({100 * best.disagreement.mean:.0f} %)"
        )
    why += f", and members lose {_damage(best)}"
    if beyond:
        why += f", at {beyond.rung.sigma:g} {_damage(beyond)}"
    return f"{why}; larger ones may be better, try by --sigmas" if last else why


def _surely(lost: Figure) -> float:
    """A standard error less; NaN where nothing is known, which is more than nothing."""
    return lost.mean - (lost.error if math.isfinite(lost.error) else 0.0)


def _damage(outcome: Tried) -> str:
    told = f"{max(0.0, outcome.lost.mean):.2g} where they differ by {outcome.signal.spread:.2g}"
    if math.isnan(outcome.right):
        return told
    return f"{told} (accuracy {max(0.0, outcome.accuracy_lost.mean):.2g} of {outcome.right:.2g})"


def _by_answers(bearable: Sequence[Tried]) -> tuple[Tried, str, bool]:
    """The smallest sigma at which most pairs answer differently, which rewards need to differ at all."""
    why = "no two rewards of a pair differ at any sigma that is bearable, so nothing can be learned"
    remedy = "a reward with steps in between, easier or more prompts tell members apart"
    for outcome in bearable:
        if outcome.rung.identical <= IDENTICAL:
            return (
                outcome,
                f"{why} ({remedy}); chosen because most pairs answer differently from there on",
                True,
            )
    return bearable[-1], f"{why}, and most pairs answer alike even at the largest; try larger ones", True
