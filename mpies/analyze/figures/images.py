"""The panel of all members' rewards, as an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import series
from mpies.analyze.figures.view import BARS, View, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIPES = 6  # runs whose members are shown; of more, a line for each run


def draw_members(axes: Axes, view: View) -> None:
    if len(view.runs) <= STRIPES:
        images = [series.sorted_rewards(run) for run in view.runs]
        _stripes(axes, view, images)
        axes.set_ylabel("members, best on top" if view.single else "members of each run, best on top")
    else:
        _lines_of_runs(axes, view)


def _stripes(axes: Axes, view: View, images: list[np.ndarray]) -> None:
    """The images above one another, in one scale of colours."""
    low, high = _range(np.concatenate([image.ravel() for image in images]))
    top, gap = float(len(images)), 0.04 if len(images) > 1 else 0.0
    for image in images:
        top -= 1.0
        if image.size:
            extent = (-0.5, image.shape[1] - 0.5, top + gap, top + 1 - gap)
            drawn = _image(axes, image, extent, low, high)
    axes.set_yticks(np.arange(len(images)) + 0.5, [short(s.name) for s in view.shown[::-1]], fontsize=7)
    if view.single:
        axes.set_yticks([])
    axes.set_xlim(-0.5, max(image.shape[1] for image in images) - 0.5)
    axes.set_ylim(0, len(images))
    axes.set_xlabel("generation")
    axes.figure.colorbar(drawn, ax=axes, label="reward", extend="both", pad=0.02)


def _lines_of_runs(axes: Axes, view: View) -> None:
    """A line for each run: the mean reward."""
    longest = max(run.committed for run in view.runs)
    image = np.full((len(view.runs), longest), np.nan)
    order = np.argsort([-series.last_mean(run.column("generation/reward_mean")) for run in view.runs])
    for line, i in enumerate(order):
        image[line, : view.runs[i].committed] = view.runs[i].column("generation/reward_mean")
    drawn = _image(axes, image, (-0.5, longest - 0.5, len(order) - 0.5, -0.5), *_range(image))
    if len(order) <= BARS:
        axes.set_yticks(range(len(order)), [short(view.shown[i].name) for i in order], fontsize=7)
    else:
        axes.set_yticks([])
    axes.set_xlabel("generation")
    axes.set_title("Mean reward of every run")
    axes.set_ylabel("runs, best on top")
    axes.figure.colorbar(drawn, ax=axes, label="mean reward", extend="both", pad=0.02)


def _image(axes: Axes, image: np.ndarray, extent: tuple, low: float, high: float):
    import matplotlib

    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#FFFFFF")
    return axes.imshow(
        image, cmap=colours, vmin=low, vmax=high, extent=extent, aspect="auto", interpolation="nearest"
    )


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the first to the 99th percentile, so that an outlier does not take all colours."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [1, 99]) if values.size else (0.0, 1.0)
    return float(low), float(high) if high > low else float(low) + 1.0
