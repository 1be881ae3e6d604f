"""Who is drawn how: colours that colour-blind readers tell apart, and what happens with many runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpies.analyze.groups import Group, group
from mpies.analyze.run import Run, short_names
from mpies.splits import HELD_OUT

# Okabe and Ito's palette without its yellow, which is hard to see as a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CONTEXT = "#B0B0B0"  # runs that are there for comparison
LABEL = 48  # longest label, in characters
BARS = 20  # runs that have a bar or a line with a name


@dataclass(frozen=True)
class Shown:
    """How a run is drawn."""

    run: Run
    name: str
    colour: str
    label: str | None
    """In the legend; None: another line stands for it."""
    thin: bool
    """One of many."""


@dataclass(frozen=True)
class View:
    """Runs and how they are drawn: each in its colour; or, where they are too many, in that of their
    group, whose mean is drawn too; or, with too many groups, the best in colour, the rest in grey."""

    shown: list[Shown]
    means: list[tuple[Group, str]]
    """Groups whose mean is drawn, with their colours."""
    note: str | None = None
    """What the legend cannot say."""

    @property
    def single(self) -> Run | None:
        """The run, if there is only one."""
        return self.shown[0].run if len(self.shown) == 1 else None

    @property
    def runs(self) -> list[Run]:
        return [shown.run for shown in self.shown]


def arrange(runs: list[Run]) -> View:
    """How to draw these runs together."""
    titles = short_names(runs)
    if len(runs) <= len(COLOURS):
        each = zip(runs, titles, COLOURS)
        return View([Shown(run, title, colour, cut(title), False) for run, title, colour in each], [])
    groups = group(runs)
    if len(groups) <= len(COLOURS):
        return _by_group(runs, titles, groups)
    return _best_in_colour(runs, titles)


def _by_group(runs: list[Run], titles: list[str], groups: list[Group]) -> View:
    colour = {id(run): c for g, c in zip(groups, COLOURS) for run in g.runs}
    shown = [Shown(run, title, colour[id(run)], None, True) for run, title in zip(runs, titles)]
    return View(shown, list(zip(groups, COLOURS)), "thin: each run; thick: mean over the runs of a group")


def _best_in_colour(runs: list[Run], titles: list[str]) -> View:
    ranking = sorted(range(len(runs)), key=lambda i: -_score(runs[i]))
    colours = dict(zip(ranking, COLOURS))
    shown = [
        Shown(run, title, colours.get(i, CONTEXT), cut(title) if i in colours else None, i not in colours)
        for i, (run, title) in enumerate(zip(runs, titles))
    ]
    return View(shown, [], f"coloured: the best {len(colours)} of {len(runs)} runs; grey: the others")


def _score(run: Run) -> float:
    """The last held-out reward, or else the last mean reward."""
    _, rewards = run.evaluated(HELD_OUT)
    means = run.column("generation/reward_mean")
    means = means[np.isfinite(means)]
    last = rewards if rewards.size else means
    return float(last[-1]) if last.size else -math.inf


def cut(text: str) -> str:
    """A label of bearable length: its end, which is what tells paths apart."""
    return text if len(text) <= LABEL else "..." + text[3 - LABEL :]


def short(name: str) -> str:
    """A label beside an axis: shorter still."""
    return name if len(name) <= 22 else "..." + name[-19:]


def line_style(shown: Shown) -> dict[str, Any]:
    """Matplotlib's options for a run's line."""
    return {"lw": 0.6, "alpha": 0.45, "zorder": 1.5} if shown.thin else {"lw": 1.6, "zorder": 2}


def label_of(shown: Shown, view: View, what: str) -> str | None:
    """What a line is called: what it is, where there is one run; else its run."""
    return what if view.single else shown.label
