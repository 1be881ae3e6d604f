"""What the answers at a sigma tell: what is lost, what differs, how much of that is signal, what steps gain.

Of antithetic pairs (axis 0) and prompts (axis 1), the same ones at every sigma. d_jk is half the difference
between the rewards of pair j's members on prompt k: what the pair adds to the update, which the other, common
half of their rewards does not touch. It is taken apart as in an analysis of variance (Searle, Casella and
McCulloch 1992, "Variance components", chapter 3): the pair's own part, the same on all prompts, is what a
step learns; the rest is about the prompts that a generation happened to have, and falls with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.es.fitness import RELATIVE_SPREAD
from mpies.es.symptoms import ACCURACY
from mpies.measure.statistics import Figure, mean, over_prompts

if TYPE_CHECKING:
    from mpies.tasks.base import Played

# Errors that are smaller in proportion are those of arithmetic.
ROUNDING = 1e-9

# Of the unperturbed model's right answers, that members or steps may lose: a reward may rise while they do.
RIGHT_LOST = 0.5


@dataclass(frozen=True)
class Base:
    """One model's answers: arrays (prompts,), NaN where not scored or measured."""

    rewards: np.ndarray
    accuracies: np.ndarray
    tokens: np.ndarray
    truncated: float
    """The share of answers that were cut off."""

    @classmethod
    def of(cls, played: Played) -> Base:
        """Of what one member has played, or the model without any."""
        made, scores = played.episodes, played.scores
        return cls(
            scores.rewards,
            scores.metrics.get(ACCURACY, np.full(len(made), np.nan)),
            np.array([one.tokens for one in made]),
            sum(one.truncated for one in made) / len(made),
        )

    def joined(self, more: Base) -> Base:
        """With answers to more prompts."""
        mine, theirs = len(self.rewards), len(more.rewards)
        return Base(
            np.append(self.rewards, more.rewards),
            np.append(self.accuracies, more.accuracies),
            np.append(self.tokens, more.tokens),
            (mine * self.truncated + theirs * more.truncated) / (mine + theirs),
        )

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reward": mean(self.rewards),
            "accuracy": mean(self.accuracies),
            "answer_tokens": mean(self.tokens),
            "truncated": self.truncated,
            "rewards": self.rewards.tolist(),
        }


@dataclass(frozen=True)
class Rung:
    """The members' answers at a sigma: arrays (members, prompts), members 2j and 2j + 1 being pair j."""

    sigma: float
    rewards: np.ndarray
    accuracies: np.ndarray
    marks: np.ndarray
    """Equal for equal answers."""
    tokens: np.ndarray
    truncated: float

    @property
    def identical(self) -> float:
        """The share of (pair, prompt) whose two answers are the same."""
        return float((self.marks[::2] == self.marks[1::2]).mean())

    @property
    def disagreement(self) -> Figure:
        """The share of (pair, prompt) whose two rewards differ, of those that were scored."""
        differences = self.rewards[::2] - self.rewards[1::2]
        return over_both(np.where(np.isfinite(differences), differences != 0, np.nan))

    @property
    def of_members(self) -> np.ndarray:
        """Each member's reward, float64 (members,): the mean over prompts, exactly rounded, as in training.

        Where answers could not be scored, prompts' own means are taken out first, and the mean is over those
        that were: training would leave such a member out, and here they may all be such.
        """
        values = self.rewards
        if not np.isfinite(values).all():  # the mean is put back: differences are told from rounding by it
            values = values - _mean(values, 0) + mean(values)
        return np.array([mean(own) for own in values])

    @property
    def moves(self) -> bool:
        """Would an update move anything: does any pair's members' reward differ?"""
        own = self.of_members
        first, second = own[::2], own[1::2]
        same = np.isclose(first, second, rtol=RELATIVE_SPREAD, atol=0, equal_nan=True)
        return not same.all()

    @property
    def halves(self) -> np.ndarray:
        """d_jk, float64 (pairs, prompts)."""
        return (self.rewards[::2] - self.rewards[1::2]) / 2

    def lost(self, base: Base) -> Figure:
        """Of the reward, against the unperturbed model on the same prompts; negative: gained."""
        return over_both(base.rewards - _of_pairs(self.rewards))

    def lost_since(self, smaller: Rung) -> Figure:
        """Of the reward, against the same members at a smaller sigma."""
        return over_both(_of_pairs(smaller.rewards) - _of_pairs(self.rewards))

    def accuracy_lost(self, base: Base) -> Figure:
        return over_both(base.accuracies - _of_pairs(self.accuracies))


@dataclass(frozen=True)
class Signal:
    """What a step at this sigma would learn, with as many prompts as a generation has."""

    step: float
    """Variance of the pairs' own parts, sigma_a^2: squared rewards; negative: nothing can be seen."""
    noise: float
    """Variance, between pairs, of what is about the generation's prompts: sigma_e^2 / prompts."""
    spread: float
    """Standard deviation of the members' rewards in such a generation."""

    @property
    def to_noise(self) -> float:
        """Signal to noise, as variances; NaN where members never differ, or of a single prompt."""
        if not self.noise > 0:
            return math.inf if self.noise == 0 and self.step > 0 else math.nan
        return max(0.0, self.step) / self.noise


@dataclass(frozen=True)
class Stride:
    """The update of a rung's members, tried: what the weights answer to other prompts after it."""

    length: float
    """What its noise moves a weight by, in perturbations of the rung's sigma."""
    alpha: float
    ground: Base
    """The unperturbed model's answers to the same prompts."""
    after: Base

    def joined(self, more: Stride) -> Stride:
        """The same step, tried on more prompts."""
        return replace(self, ground=self.ground.joined(more.ground), after=self.after.joined(more.after))

    @property
    def bearable(self) -> bool:
        """Can it be taken: is its reward known, and have most right answers stayed?"""
        ruined = loses_most(self.accuracy_lost, mean(self.ground.accuracies))
        return math.isfinite(self.gain.mean) and not ruined

    @property
    def gain(self) -> Figure:
        """Of reward, prompt by prompt."""
        return over_prompts((self.after.rewards - self.ground.rewards)[:, None])

    @property
    def accuracy_lost(self) -> Figure:
        return over_prompts((self.ground.accuracies - self.after.accuracies)[:, None])

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        lost = asdict(self.accuracy_lost)
        told = {"length": self.length, "alpha": self.alpha, "gain": asdict(self.gain), "accuracy_lost": lost}
        return told | self.after.figures()


def signal(rung: Rung, prompts: int) -> Signal:
    """With so many prompts in a generation."""
    step, noise = components(rung.halves, centred=True)
    own, rest = components(rung.rewards, centred=False)
    spread = math.sqrt(max(0.0, own) + max(0.0, rest) / prompts) if math.isfinite(own + rest) else math.nan
    return Signal(step, noise / prompts, spread)


def components(values: np.ndarray, centred: bool) -> tuple[float, float]:
    """(variance of the rows' own parts, of the rest), unbiased: values float64 (rows, prompts), NaN left out.

    `centred`: the mean is known to be 0, as that of half differences is, whose sign is by chance. Else each
    prompt's own mean is taken out first. The rest cannot be told of a single prompt: NaN.
    """
    if not centred:
        values = values - _mean(values, axis=0)
    known = np.isfinite(values).sum(axis=1)
    values, known = values[known > 0], known[known > 0]
    rows = len(values)
    free = int((known - 1).sum())
    if free < 1 or rows < 2:
        return math.nan, math.nan
    means = _mean(values, axis=1)
    squares = np.nansum((values - means[:, None]) ** 2)
    # Where prompts' means were taken out, 1 / rows of the freedom went with them.
    share = 1.0 if centred else (rows - 1) / rows
    rest = float(squares / (free * share))
    between = float((means**2).sum() / (rows * share))
    return between - rest / float(np.mean(known)), rest


def over_both(values: np.ndarray) -> Figure:
    """The mean of (pairs, prompts), NaN left out, with its standard error over both pairs and prompts.

    The sum of the variances of the pairs' and of the prompts' means: a little too large, by the part that
    is neither's, which both have. NaN of a single prompt.
    """
    if not np.isfinite(values).any():
        return Figure(math.nan)
    squares = [_squared_error(_mean(values, axis)) for axis in (0, 1)]
    return Figure(float(np.nanmean(values)), math.sqrt(sum(squares)))


def loses_most(lost: Figure, right: float) -> bool:
    """Surely more than RIGHT_LOST of an accuracy? Not where nothing was measured."""
    return surely(lost) > RIGHT_LOST * right


def surely(figure: Figure) -> float:
    """A standard error less; NaN where nothing is known."""
    return figure.mean - (figure.error if math.isfinite(figure.error) else 0.0)


def shown(figure: Figure, signed: bool = False) -> str:
    """With its error, both to the place that the error begins at, or one more if that is a 1 or 2."""
    if math.isnan(figure.mean):
        return "-"
    sign = "+" if signed else ""
    if not ROUNDING * max(1e-6, abs(figure.mean)) < figure.error < math.inf:
        return f"{figure.mean:{sign}.3g}"
    leading = math.floor(math.log10(figure.error))
    places = max(0, -leading + (figure.error < 3 * 10.0**leading))
    told = round(figure.mean, places) + 0.0  # no -0
    return f"{told:{sign}.{places}f}+-{figure.error:.{places}f}"


def jackknife(function: Callable[[Rung], float], rung: Rung) -> float:
    """The standard error of a figure of a rung over its pairs, by leaving out one after another."""
    pairs = len(rung.rewards) // 2
    values = np.array([function(_without(rung, pair)) for pair in range(pairs)])
    if pairs < 3 or not np.isfinite(values).all():
        return math.nan
    return math.sqrt((pairs - 1) / pairs * float(((values - values.mean()) ** 2).sum()))


def _without(rung: Rung, pair: int) -> Rung:
    kept = np.delete(np.arange(len(rung.rewards)), [2 * pair, 2 * pair + 1])
    names = ("rewards", "accuracies", "marks", "tokens")
    return replace(rung, **{name: getattr(rung, name)[kept] for name in names})


def _of_pairs(values: np.ndarray) -> np.ndarray:
    return (values[::2] + values[1::2]) / 2


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """NaN left out; NaN where there is nothing else."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _squared_error(means: np.ndarray) -> float:
    means = means[np.isfinite(means)]
    return float(means.var(ddof=1) / len(means)) if len(means) > 1 else math.nan
