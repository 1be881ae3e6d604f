"""Panels of what the weights became: accuracy, distance to the initial model in behaviour and in L2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import series
from mpies.analyze.figures.view import View, label_of, line_style
from mpies.analyze.run import Run
from mpies.splits import HELD_OUT, TRAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_accuracy(axes: Axes, view: View) -> None:
    """Shares of right answers, with the standard error of a share of so many prompts, where it is known."""
    label: str | None = "± standard error"
    for shown in view.shown:
        generations, shares = shown.run.evaluated(HELD_OUT, "accuracy")
        style = {**line_style(shown), "marker": "" if shown.thin else "o", "ms": 4, "mfc": "white"}
        if (prompts := series.held_out_prompts(shown.run)) and not shown.thin:
            errors = 100 * np.sqrt(shares * (1 - shares) / prompts)
            axes.errorbar(generations, 100 * shares, errors, color=shown.colour, fmt="none", elinewidth=1,
                          capsize=2, zorder=1.8, label=label)  # fmt: skip
            label = None
        name = label_of(shown, view, "unperturbed, held-out prompts")
        axes.plot(generations, 100 * shares, color=shown.colour, label=name, **style)
    axes.set_xlabel("generation")
    axes.set_ylabel("accuracy, held-out prompts [%]")
    if view.single and label is None:
        axes.legend(loc="best")


def draw_kl(axes: Axes, view: View) -> None:
    for shown in view.shown:
        generations, kl = shown.run.evaluated(HELD_OUT, "kl")
        reward = dict(zip(*(column.tolist() for column in shown.run.evaluated(HELD_OUT))))
        y = np.array([reward.get(g, np.nan) for g in generations.tolist()])
        axes.plot(kl, y, "-", color=shown.colour, alpha=0.5, lw=0.8 if shown.thin else 1.2)
        # Later generations are larger; of one run among many, there is room for the last only.
        size = 8 + 40 * np.arange(1, len(kl) + 1) / max(1, len(kl))
        first = -1 if shown.thin else 0
        axes.scatter(kl[first:], y[first:], size[first:], color=shown.colour, label=shown.label, lw=0)
    axes.set_xlabel("KL divergence to the initial model [nat/token]")
    axes.set_ylabel("reward, held-out prompts")


def draw_drift(axes: Axes, view: View) -> None:
    for shown in view.shown:
        if not shown.run.settings.get("es", {}).get("anchor_decay"):  # which draws the weights back
            expected = series.expected_drift(shown.run)
            label = label_of(shown, view, "expected of independent noise")
            x = np.arange(len(expected))
            axes.plot(x, expected, color=shown.colour, label=label, **line_style(shown))
        generations, measured = _drift(shown.run)
        if measured.size:
            axes.plot(generations, measured, "o", color=shown.colour, ms=4, mfc="white",
                      label="measured" if view.single else None)  # fmt: skip
    axes.set_xlabel("generation")
    axes.set_ylabel("L2 distance to the initial weights")
    if view.single:
        axes.legend(loc="lower right")


def _drift(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Measured distances, whichever split they were noted with."""
    both = [run.evaluated(split, "drift_l2") for split in (TRAIN, HELD_OUT)]
    generations = np.concatenate([g for g, _ in both])
    first = np.unique(generations, return_index=True)[1]
    return generations[first], np.concatenate([values for _, values in both])[first]
