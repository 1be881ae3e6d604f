"""Panels of reward curves: over generations, answers and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import series
from mpies.analyze.figures.view import Shown, View, cut, label_of, line_style
from mpies.analyze.groups import Group
from mpies.analyze.run import Run
from mpies.splits import HELD_OUT, TRAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Callable[[Run], np.ndarray]
# Where on a curve's x axis generations lie.
Abscissa = Callable[[Run, np.ndarray], np.ndarray]


def draw_learning(axes: Axes, view: View) -> None:
    _rewards(axes, view, lambda run: np.arange(run.committed), lambda run, generations: generations)
    axes.set_xlabel("generation")
    if view.single:
        axes.legend(loc="best")


def draw_answers(axes: Axes, view: View) -> None:
    from matplotlib.ticker import EngFormatter

    counts = {id(run): series.prompts_per_member(run) for run in view.runs}
    known = all(counts.values())

    def x(run: Run) -> np.ndarray:
        return series.members_evaluated(run) * (counts[id(run)] if known else 1)

    def at(run: Run, generations: np.ndarray) -> np.ndarray:
        return generations * run.population * (counts[id(run)] if known else 1)

    _rewards(axes, view, x, at)
    axes.set_xlabel("answers evaluated" if known else "members evaluated")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_time(axes: Axes, view: View) -> None:
    longest = max(series.hours(run)[-1] for run in view.runs)
    unit, per_hour = ("hours", 1) if longest >= 1 else ("minutes", 60)

    def before(run: Run) -> np.ndarray:
        return per_hour * np.concatenate([[0.0], series.hours(run)])

    _rewards(axes, view, lambda run: before(run)[:-1], lambda run, g: before(run)[g])
    axes.set_xlabel(f"{unit} of computing")


def _rewards(axes: Axes, view: View, x: Curve, at: Abscissa) -> None:
    """Reward curves over x(run) (G,), and evaluations over at(run, their generations)."""
    for shown in view.shown:
        run = shown.run
        across, means = x(run), run.column("generation/reward_mean")
        if len(view.shown) <= 3:
            _spread(axes, across, means, run.column("generation/reward_std"), shown, view)
        _line(axes, across, means, shown, label_of(shown, view, "mean of the members"))
        _evaluations(axes, view, shown, at)
    for group, colour in view.means:
        _mean_line(axes, group, x, colour)
        _mean_evaluations(axes, group, at, colour)
    axes.set_ylabel("reward")


def _spread(axes: Axes, x, means, deviations, shown: Shown, view: View) -> None:
    label = "standard deviation" if view.single else None
    low, high = means - deviations, means + deviations
    axes.fill_between(x, low, high, color=shown.colour, alpha=0.15, lw=0, label=label)


def _line(axes: Axes, x, y, shown: Shown, label: str | None = None) -> None:
    """A run's curve; where it is long, its running mean, with the curve itself behind, if there is room."""
    smooth = series.smooth(y)
    if not shown.thin and len(y) >= 40:
        axes.plot(x, y, color=shown.colour, alpha=0.3, lw=0.5)
    axes.plot(x, smooth, color=shown.colour, label=label or shown.label, **line_style(shown))


def _evaluations(axes: Axes, view: View, shown: Shown, at: Abscissa) -> None:
    """Unperturbed weights: circles on held-out prompts, and, where it is not too much, crosses on train."""
    if shown.thin:
        return
    splits = {HELD_OUT: ("o", "unperturbed, held-out prompts")}
    if view.single:
        splits[TRAIN] = ("x", "unperturbed, training prompts")
    for split, (marker, label) in splits.items():
        generations, rewards = shown.run.evaluated(split)
        if rewards.size:
            # Two points are no curve.
            axes.plot(at(shown.run, generations), rewards, marker, ls=":" if rewards.size > 2 else "",
                      lw=0.8, ms=4.5,
                      color="#D55E00" if view.single and split == HELD_OUT else shown.colour,
                      mfc="white", label=label if view.single else None, zorder=3)  # fmt: skip


def _mean_line(axes: Axes, group: Group, x: Curve, colour: str) -> None:
    """The mean over a group's runs, as far as all of them go."""
    length = min(run.committed for run in group.runs)
    rewards = [series.smooth(run.column("generation/reward_mean"))[:length] for run in group.runs]
    across = np.mean([x(run)[:length] for run in group.runs], axis=0)
    label = f"{cut(group.label)} ({len(group.runs)} runs)"
    axes.plot(across, np.mean(rewards, axis=0), color=colour, lw=2.2, label=label, zorder=3)


def _mean_evaluations(axes: Axes, group: Group, at: Abscissa, colour: str) -> None:
    """The mean over a group's runs, at the generations at which all were evaluated."""
    found = [dict(zip(*(column.tolist() for column in run.evaluated(HELD_OUT)))) for run in group.runs]
    common = np.array(sorted(set.intersection(*(set(one) for one in found))), dtype=int)
    if common.size:
        across = np.mean([at(run, common) for run in group.runs], axis=0)
        rewards = np.mean([[one[g] for g in common.tolist()] for one in found], axis=0)
        axes.plot(across, rewards, "o", color=colour, ms=4, mfc="white", zorder=4)
