"""What a run's figures say about why it does not learn: each rule looks at the latest generations.

A rule returns a line, or nothing. The same rules speak while a run is made and when its file is read later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# One generation may be odd by the prompts that it happened to have: a rule is about this many in a row.
PATIENCE = 3

# Where half of the pairs of answers are the same, half of the answers are made for nothing: a pair without a
# difference has no part in the update. A run of others in which half of the members' answers were the same
# did not learn (sigma 3e-4 for a model of 1.7e9 parameters); one with three times the sigma did.
IDENTICAL = 0.5

# Members lose in proportion to sigma squared and differ in proportion to sigma. A mean that is two standard
# deviations of the members below the unperturbed model says that nearly all of them are worse than it: what
# they differ in is how much was damaged. A generation's mean over 8 members has an error of 0.35 of these.
FAR = 2.0

# A cosine of 0.9 is 81 % of the update's squared length, one of 0.3 is 9 %. Means over PARTS generations,
# because a generation of D directions has cosines of 1/sqrt(D) by chance: 0.25 for 16, which is 0.08 in the
# mean over ten.
TAKEN, LEFT_OUT, PARTS = 0.9, 0.3, 10

# A share of answers: one more in ten is cut off. With 200 answers a generation, the share of a generation is
# known to 0.035 at most, a mean of three to 0.02.
TRUNCATED = 0.1

# What says whether answers are right.
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Course:
    """Figures by generation, float64 (G,), NaN where there is none."""

    identical_pairs: np.ndarray
    truncated: np.ndarray
    cosines: dict[str, np.ndarray] = field(default_factory=dict)
    """Of each figure's own update with the one that was made."""
    parts: frozenset[str] = frozenset()
    """Of these figures, those that the reward is made of, where it has several."""
    of_probabilities: bool = False
    """Is the reward made of probabilities (task.expects)? Then answers that are the same teach as well."""


def find_small_sigma(course: Course) -> str | None:
    """Most answers are the same whatever the perturbation."""
    latest = course.identical_pairs[-PATIENCE:]
    if course.of_probabilities or len(latest) < PATIENCE or not (latest > IDENTICAL).all():
        return None
    return (
        f"{100 * latest.mean():.0f} % of the pairs of answers to a prompt are identical, and teach"
        " nothing. A larger es.sigma makes members answer differently, unless answers are as good as they can"
        " be"
    )


def find_truncation(course: Course) -> str | None:
    """More answers are cut off than at first."""
    shares = course.truncated[np.isfinite(course.truncated)]
    if len(shares) < 2 * PATIENCE:
        return None
    first, latest = shares[:PATIENCE].mean(), shares[-PATIENCE:].mean()
    if latest < first + TRUNCATED:
        return None
    return (
        f"{100 * latest:.0f} % of the answers are cut off at engine.max_new_tokens, {100 * first:.0f} % at"
        " first. A larger engine.max_new_tokens lets them end; a reward for short ones, or a smaller"
        " es.alpha, keeps them short"
    )


def find_taken_over(course: Course) -> str | None:
    """One figure takes the update, and right answers, or another part of the reward, have no share in it."""
    latest = {name: latest_mean(values) for name, values in course.cosines.items()}
    means = {name: mean for name, mean in latest.items() if mean is not None}
    wanted = [name for name in means if name in course.parts | {ACCURACY}]
    strongest = max(means, key=lambda name: abs(means[name]), default="")
    out = [name for name in wanted if means[name] <= LEFT_OUT and name != strongest]
    if not out or abs(means[strongest]) < TAKEN:
        return None
    least = min(out, key=means.__getitem__)
    return (
        f"the update is that of {strongest} alone (cosine {means[strongest]:.2f} over {PARTS} generations,"
        f" {100 * means[strongest] ** 2:.0f} % of it); {least} has little part in it ({means[least]:.2f})."
        f" Give {least} more weight in the reward, or the other less"
    )


def latest_mean(values: np.ndarray, least: int = PARTS) -> float | None:
    """The mean of the latest PARTS values; None where there are fewer than `least`.

    NaN counts as 0: a figure that is the same for all members has no part in the update.
    """
    latest = values[-PARTS:]
    return float(np.nan_to_num(latest).mean()) if len(latest) >= least else None


def is_far_below(means: np.ndarray, deviations: np.ndarray, unperturbed: float, error: float) -> bool:
    """Are the members' mean rewards, float64 (G,), lately far below the unperturbed model's?

    `deviations`: the members' standard deviations (G,); `error`: that of the unperturbed model's mean, whose
    prompts may be others; NaN: not known.
    """
    lost, spread = unperturbed - means[-PATIENCE:], deviations[-PATIENCE:]
    margin = 2 * error if np.isfinite(error) else 0.0
    return len(lost) == PATIENCE and bool((lost > FAR * spread + margin).all() and (spread > 0).all())


RULES: dict[str, Callable[[Course], str | None]] = {
    "identical": find_small_sigma,
    "truncated": find_truncation,
    "taken over": find_taken_over,
}
