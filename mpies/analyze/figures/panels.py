"""The panels of a figure: each draws one thing, for one run or many, into Matplotlib axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import learning, series
from mpies.analyze.figures import effort, images, rewards, weights, why
from mpies.analyze.figures.view import View
from mpies.es.symptoms import ACCURACY
from mpies.splits import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    title: str
    draw: Callable[[Axes, View], None]
    applies: Callable[[View], bool]
    """Is there anything to draw?"""
    tells_more: Callable[[View], bool] = lambda view: True
    """Does it show what no panel before it shows? If not, it is drawn only where it is asked for."""


def _any_generation(view: View) -> bool:
    return any(run.committed for run in view.runs)


def _several(view: View) -> bool:
    """Of one run, rewards against time or answers are the learning curve in another unit."""
    return len(view.runs) > 1


def _differ_in_effort(view: View) -> bool:
    return len({(run.population, series.prompts_per_member(run)) for run in view.runs}) > 1


def _has_accuracy(view: View) -> bool:
    return any(run.evaluated(HELD_OUT, "accuracy")[1].size for run in view.runs)


def _has_kl(view: View) -> bool:
    return any(run.evaluated(HELD_OUT, "kl")[1].size for run in view.runs)


def _has_ranks(view: View) -> bool:
    return any(run.committed and run.tables["start"]["world_size"].max() > 1 for run in view.runs)


def _has_signal(view: View) -> bool:
    return any(np.isfinite(run.column("generation/pairs_with_signal")).any() for run in view.runs)


def _has_cosines(view: View) -> bool:
    """Of any figure of one run; of several, of what all may have."""
    found = [learning.cosines(run) for run in view.runs]
    return any(found) if view.single else any(ACCURACY in cosines for cosines in found)


def _has_changes(view: View) -> bool:
    return any(learning.changes_since_start(run, HELD_OUT) for run in view.runs)


PANELS = {
    "learning": Panel("Learning curve", rewards.draw_learning, _any_generation),
    "answers": Panel("Reward against answers", rewards.draw_answers, _any_generation, _differ_in_effort),
    "time": Panel("Reward against time", rewards.draw_time, _any_generation, _several),
    "members": Panel("Rewards of all members", images.draw_members, _any_generation),
    "ranks": Panel("Balance of the ranks", effort.draw_ranks, _has_ranks),
    "phases": Panel("Where the time goes", effort.draw_phases, _any_generation),
    "drift": Panel("Drift of the weights", weights.draw_drift, _any_generation),
    "accuracy": Panel("Accuracy", weights.draw_accuracy, _has_accuracy),
    "signal": Panel("What answers tell", why.draw_signal, _has_signal),
    "shares": Panel("Whose update it is", why.draw_shares, _has_cosines),
    "changes": Panel("Prompts fixed and broken", why.draw_changes, _has_changes),
    "kl": Panel("Reward and KL divergence", weights.draw_kl, _has_kl),
}
