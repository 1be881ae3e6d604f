"""Panels of why a run learns, or not: its pairs' signal, whose update it is, prompts fixed and broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import learning, series
from mpies.analyze.figures.view import COLOURS, View, cut, line_style
from mpies.es.symptoms import ACCURACY
from mpies.splits import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "pairs_with_signal": "pairs whose rewards differ",
    "identical_pairs": "pairs of identical answers",
    "prompts_disagreeing": "prompts that divide the members",
    "truncated": "answers cut off",
}


def draw_signal(axes: Axes, view: View) -> None:
    """Shares of pairs, prompts and answers; of several runs, the pairs with a signal."""
    names = LABELS if view.single else {"pairs_with_signal": ""}
    for shown in view.shown:
        x = np.arange(shown.run.committed)
        for (name, label), colour in zip(names.items(), COLOURS):
            shares = 100 * series.smooth(shown.run.column(f"generation/{name}"))
            axes.plot(x, shares, color=colour if view.single else shown.colour,
                      label=label or shown.label, **line_style(shown))  # fmt: skip
    axes.set_ylim(-3, 103)
    axes.set_xlabel("generation")
    axes.set_ylabel("share [%]" if view.single else "pairs whose rewards differ [%]")
    if view.single:
        axes.legend(loc="best")


def draw_shares(axes: Axes, view: View) -> None:
    """Cosines of the figures' own updates with the one made; of several runs, that of accuracy."""
    for shown in view.shown:
        found = learning.cosines(shown.run)
        if view.single:
            found = {name: found[name] for name in list(learning.cosines_lately(shown.run))[: len(COLOURS)]}
        else:
            found = {name: found[name] for name in found if name == ACCURACY}
        for (name, cosines), colour in zip(found.items(), COLOURS):
            axes.plot(np.arange(shown.run.committed), series.smooth(np.nan_to_num(cosines)),
                      color=colour if view.single else shown.colour,
                      label=cut(name) if view.single else shown.label, **line_style(shown))  # fmt: skip
    axes.axhline(0, color="black", lw=0.6)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("generation")
    axes.set_ylabel("cosine with the update" if view.single else "cosine of accuracy's update")
    if view.single:
        axes.legend(loc="best")


def draw_changes(axes: Axes, view: View) -> None:
    """Held-out prompts since the first evaluation: fixed above, broken below, net as a line."""
    for shown in view.shown:
        found = learning.changes_since_start(shown.run, HELD_OUT)
        at = [change.after for change in found]
        if view.single:
            # A stem for each, whose width does not depend on how far apart evaluations are.
            axes.vlines(at, 0, [change.fixed for change in found], color="#009E73", lw=4, label="fixed")
            axes.vlines(at, 0, [-change.broken for change in found], color="#D55E00", lw=4, label="broken")
        style = line_style(shown) | ({} if shown.thin else {"marker": "o", "ms": 4, "mfc": "white"})
        colour, label = ("black", "net") if view.single else (shown.colour, shown.label)
        start = [change.before for change in found[:1]]
        axes.plot(start + at, [0] * len(start) + [change.net for change in found], color=colour, label=label,
                  **style)  # fmt: skip
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xlabel("generation")
    axes.set_ylabel("held-out prompts since the first evaluation")
    if view.single:
        axes.legend(loc="best")
