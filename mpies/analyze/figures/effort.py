"""Panels of what it cost: time by phase, balance of the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import series
from mpies.analyze.chart import binned
from mpies.analyze.figures.view import BARS, View, line_style, short
from mpies.analyze.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Phases are areas, for which yellow does.
PHASE_COLOURS = dict(
    zip(
        ("generate", "perturb", "update", "wait", "communicate", "reward", "log", "other"),
        ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999"),
        strict=True,
    )
)
STRETCHES = 200  # points of a stacked area


def draw_phases(axes: Axes, view: View) -> None:
    if view.single:
        _phases_of_one(axes, view.single)
    else:
        _phases_of_many(axes, view)


def draw_ranks(axes: Axes, view: View) -> None:
    if view.single:
        _ranks_of_one(axes, view.single)
        return
    for shown in view.shown:
        imbalance = series.smooth(shown.run.column("generation/imbalance"))
        axes.plot(np.arange(shown.run.committed), imbalance, color=shown.colour, label=shown.label,
                  **line_style(shown))  # fmt: skip
    axes.axhline(1, color="black", lw=0.6)
    axes.set_xlabel("generation")
    axes.set_ylabel("slowest rank's time / mean")


def _phases_of_one(axes: Axes, run: Run) -> None:
    seconds = {p: binned(s, STRETCHES) for p, s in _ordered(series.phase_seconds(run)).items()}
    x = np.linspace(0, run.committed - 1, min(run.committed, STRETCHES))
    total = sum(s.sum() for s in seconds.values())
    labels = [f"{phase} {100 * s.sum() / total:.1f} %" for phase, s in seconds.items()]
    axes.stackplot(x, *seconds.values(), colors=[PHASE_COLOURS[p] for p in seconds], labels=labels, lw=0)
    axes.margins(x=0)
    axes.set_xlabel("generation")
    axes.set_ylabel("seconds per generation")
    handles, texts = axes.get_legend_handles_labels()
    # Within: beside the panel, it would push the panels above and below apart.
    axes.legend(handles[::-1], texts[::-1], loc="center", frameon=True, framealpha=0.85, edgecolor="none")


def _phases_of_many(axes: Axes, view: View) -> None:
    """A bar for each run, of shares."""
    totals = [{p: s.sum() for p, s in _ordered(series.phase_seconds(run)).items()} for run in view.runs]
    sums = [sum(total.values()) or 1.0 for total in totals]
    order = np.argsort([-total["generate"] / s for total, s in zip(totals, sums)], kind="stable")
    left, height = np.zeros(len(order)), 0.8 if len(order) <= BARS else 1.0
    for phase, colour in PHASE_COLOURS.items():
        share = np.array([100 * totals[i][phase] / sums[i] for i in order])
        axes.barh(range(len(order)), share, left=left, color=colour, label=phase, height=height)
        left += share
    if len(order) <= BARS:
        axes.set_yticks(range(len(order)), [short(view.shown[i].name) for i in order], fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_ylabel("runs")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time [%]")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))


def _ordered(seconds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {phase: seconds[phase] for phase in PHASE_COLOURS}


def _ranks_of_one(axes: Axes, run: Run) -> None:
    """Each rank's evaluation time over the mean: median and the middle 80 % of the generations."""
    from matplotlib.ticker import MaxNLocator

    busy = series.rank_seconds(run)
    sizes = series.world_sizes(run)
    busy = busy[sizes == sizes[-1], : sizes[-1]]
    relative = busy / np.maximum(busy.mean(axis=1, keepdims=True), 1e-300)
    low, middle, high = np.percentile(relative, [10, 50, 90], axis=0)
    axes.errorbar(np.arange(sizes[-1]), middle, [middle - low, high - middle], fmt="o", ms=4,
                  color="#0072B2", ecolor="#56B4E9", elinewidth=2)  # fmt: skip
    axes.axhline(1, color="black", lw=0.6)
    axes.set_ylim(0, max(1.2, 1.1 * high.max()))
    axes.set_xlim(-0.6, sizes[-1] - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel("rank")
    axes.set_ylabel("evaluation time / mean of the ranks")
