"""The ladder as a picture: what is lost and what differs, over sigma; what steps gain, over their alpha."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpies.drawing import LOOK, save
from mpies.measure.statistics import Figure, mean
from mpies.probe.probing import Probed
from mpies.probe.recommendation import Recommendation, Tried
from mpies.probe.rung import Base

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = 12  # for which there is room
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
MARKERS = "osv^D<>Ph"


def draw(probed: Probed, recommended: Recommendation, form: str) -> bytes:
    """As a png, svg or pdf file; the sigma that is recommended, and the step, get a line."""
    import matplotlib
    from matplotlib import figure

    outcomes = probed.outcomes
    sigmas = [outcome.rung.sigma for outcome in outcomes]
    sigmas = sigmas[:: -(-len(sigmas) // TICKS)]
    file = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        drawing = figure.Figure(figsize=(12.0, 3.4), layout="constrained")
        lost, differing, gained = drawing.subplots(1, 3)
        _lost(lost, probed.base, outcomes)
        _differing(differing, outcomes)
        _gained(gained, outcomes, recommended)
        for axes in (lost, differing):
            axes.set_xscale("log")
            axes.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel("sigma")
            axes.axvline(recommended.sigma, color="black", lw=0.8, ls=":")
        save(drawing, file, form)
    return file.getvalue()


def _lost(axes: Axes, base: Base, outcomes: list[Tried]) -> None:
    axes.set_title("Reward of the members")
    level = mean(base.rewards)
    _curve(axes, outcomes, BLUE, "members, ± standard error of the loss", lambda o: _below(level, o.lost))
    axes.axhline(level, color="grey", lw=0.8, label="unperturbed")
    axes.set_ylabel("reward")
    right = mean(base.accuracies)
    if np.isfinite(right) and not np.array_equal(base.accuracies, base.rewards):
        beside = axes.twinx()
        _curve(beside, outcomes, RED, "accuracy (right axis)", lambda o: _below(right, o.accuracy_lost))
        beside.set_ylabel("accuracy")
        beside.spines.right.set_visible(True)
        handles, labels = axes.get_legend_handles_labels()
        more, named = beside.get_legend_handles_labels()
        beside.legend(handles + more, labels + named, loc="best")
    else:
        axes.legend(loc="best")


def _differing(axes: Axes, outcomes: list[Tried]) -> None:
    axes.set_title("Answers of a pair")
    shares: dict[str, tuple[str, Callable[[Tried], Figure]]] = {
        "identical": (BLUE, lambda o: Figure(o.rung.identical)),
        "with different rewards": (GREEN, lambda o: o.disagreement),
        "cut off": (PINK, lambda o: Figure(o.rung.truncated)),
    }
    for label, (colour, share) in shares.items():
        _curve(axes, outcomes, colour, label, share, 100)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share [%]")
    axes.legend(loc="best")


def _gained(axes: Axes, outcomes: list[Tried], recommended: Recommendation) -> None:
    from matplotlib import colormaps

    axes.set_title("One step, tried")
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xlabel("alpha of the step")
    axes.set_ylabel("reward gained")
    tried = [outcome for outcome in outcomes if outcome.steps]
    if not tried:
        axes.set_xticks([])
        axes.text(0.5, 0.6, "no step was worth trying", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log")
    alphas = _apart(sorted(step.alpha for outcome in tried for step in outcome.steps))
    axes.set_xticks(alphas, [f"{alpha:.2g}" for alpha in alphas], rotation=45)
    axes.minorticks_off()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(tried)))
    for i, (outcome, colour) in enumerate(zip(tried, colours, strict=True)):
        gains = [step.gain for step in outcome.steps]
        errors = np.nan_to_num([gain.error for gain in gains])
        look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ms": 4, "lw": 1.2, "elinewidth": 0.8}
        x = [step.alpha for step in outcome.steps]
        label = f"sigma {outcome.rung.sigma:g}" if i % -(-len(tried) // TICKS) == 0 else None
        axes.errorbar(x, [g.mean for g in gains], errors, label=label, **look)
        for step in outcome.steps:
            if recommended.chose(outcome.rung.sigma, step):
                axes.axvline(step.alpha, color="black", lw=0.8, ls=":")
    axes.legend(loc="best")


def _apart(values: list[float]) -> list[float]:
    """Of rising values, as many as there is room for on a logarithmic scale."""
    least = max(1.8, (values[-1] / values[0]) ** (1 / TICKS))
    kept = values[:1]
    for value in values:
        if value > kept[-1] * least:
            kept.append(value)
    return kept


def _below(level: float, lost: Figure) -> Figure:
    return Figure(level - lost.mean, lost.error)


def _curve(
    axes: Axes,
    outcomes: list[Tried],
    colour: str,
    label: str,
    value: Callable[[Tried], Figure],
    scale: float = 1,
) -> None:
    found = [value(outcome) for outcome in outcomes]
    y = scale * np.array([figure.mean for figure in found])
    errors = scale * np.nan_to_num([figure.error for figure in found])
    x = [outcome.rung.sigma for outcome in outcomes]
    axes.errorbar(
        x, y, errors, color=colour, label=label, marker="o", ms=4, mfc="white", lw=1.4, elinewidth=1
    )
