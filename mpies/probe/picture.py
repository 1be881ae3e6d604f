"""The ladder as a picture: what is lost, what differs, what a run would net, over sigma."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpies.drawing import LOOK, save
from mpies.measure.statistics import Figure, mean
from mpies.probe.recommendation import Tried
from mpies.probe.rung import Base

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = 12  # for which there is room
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw(base: Base, outcomes: list[Tried], recommended: float | None, form: str) -> bytes:
    """As a png, svg or pdf file; `recommended`: a sigma that gets a line."""
    import matplotlib
    from matplotlib import figure

    sigmas = [outcome.rung.sigma for outcome in outcomes]
    sigmas = sigmas[:: -(-len(sigmas) // TICKS)]
    file = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        drawing = figure.Figure(figsize=(12.0, 3.4), layout="constrained")
        for axes, fill in zip(drawing.subplots(1, 3), (_lost, _differing, _whole), strict=True):
            fill(axes, base, outcomes)
            axes.set_xscale("log")
            axes.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel("sigma")
            if recommended:
                axes.axvline(recommended, color="black", lw=0.8, ls=":")
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
        beside.legend(loc="upper right")
    axes.legend(loc="lower left")


def _differing(axes: Axes, base: Base, outcomes: list[Tried]) -> None:
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


def _whole(axes: Axes, base: Base, outcomes: list[Tried]) -> None:
    axes.set_title("A whole run")
    _curve(axes, outcomes, BLUE, "what a run nets, if the reward were linear", lambda o: o.net)
    _curve(axes, outcomes, RED, "what its noise costs", lambda o: o.lost)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_ylabel("reward")
    axes.legend(loc="best")


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
