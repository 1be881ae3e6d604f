"""Panels laid out on a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mpies.analyze.figures.panels import PANELS
from mpies.analyze.figures.view import View, arrange
from mpies.analyze.run import Run
from mpies.drawing import LOOK
from mpies.errors import InputError
from mpies.splits import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (5.0, 3.4)  # inches


def draw(runs: list[Run], panels: Iterable[str] = ()) -> Figure:
    """A Matplotlib figure of the runs: the named panels, or all in which the runs show something more.

    Runs without a generation are left out. Raises InputError if nothing is left to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    runs = [run for run in runs if run.committed]
    if not runs:
        raise InputError("nothing to plot: no run has a generation yet")
    seen = arrange(runs)
    telling = [name for name, panel in PANELS.items() if panel.applies(seen) and panel.tells_more(seen)]
    wanted = list(panels) or telling
    for name in wanted:
        if not PANELS[name].applies(seen):
            raise InputError(f"nothing to plot in panel {name}: the run files have no such measurements")
    rows, columns = _grid(len(wanted))
    with matplotlib.rc_context(LOOK):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout=layout)
        for i, name in enumerate(wanted):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.set_title(PANELS[name].title)
            PANELS[name].draw(axes, seen)
            if axes.get_xlabel() == "generation":  # there is no half of one
                axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        _legend(figure, seen)
        # Fonts and sizes are looked up when it is drawn: do so while LOOK holds.
        figure.draw_without_rendering()
    return figure


def _grid(panels: int) -> tuple[int, int]:
    """(rows, columns)."""
    columns = panels if panels <= 2 else 2 if panels == 4 else 3
    return math.ceil(panels / columns), columns


def _legend(figure: Figure, seen: View) -> None:
    """One legend of the runs for all panels."""
    if seen.single:
        figure.suptitle(seen.shown[0].name, fontsize=10)
        return
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is None:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                entries.setdefault(label, handle)
    if any(run.evaluated(HELD_OUT)[1].size for run in seen.runs):
        entries["unperturbed weights, held-out prompts"] = _circle()
    columns = min(4, len(entries))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, title=seen.note
    )


def _circle():
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="", marker="o", ms=4.5, color="#606060", mfc="white")
