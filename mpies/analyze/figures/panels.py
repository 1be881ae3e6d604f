"""The panels of a figure: each draws one thing, for one run or many, into Matplotlib axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpies.analyze import series
from mpies.analyze.chart import binned
from mpies.analyze.figures.view import Shown, View, cut
from mpies.analyze.groups import Group
from mpies.analyze.run import Run
from mpies.phases import PHASES

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
BARS = 20  # runs that have a bar with a name
STRIPES = 6  # runs whose members are shown; of more, a line for each run
STRETCHES = 200  # points of a stacked area

Curve = Callable[[Run], np.ndarray]
# Where on a curve's x axis generations lie.
Place = Callable[[Run, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Panel:
    title: str
    draw: Callable[[Axes, View], None]
    applies: Callable[[View], bool]
    """Is there anything to draw?"""


def learning(axes: Axes, view: View) -> None:
    _rewards(axes, view, lambda run: np.arange(run.committed), lambda run, generations: generations)
    axes.set_xlabel("generation")
    if view.single:
        axes.legend(loc="best")


def answers(axes: Axes, view: View) -> None:
    from matplotlib.ticker import EngFormatter

    counts = {id(run): series.prompts(run) for run in view.runs}
    known = all(counts.values())

    def x(run: Run) -> np.ndarray:
        return series.members_evaluated(run) * (counts[id(run)] if known else 1)

    def at(run: Run, generations: np.ndarray) -> np.ndarray:
        return generations * run.population * (counts[id(run)] if known else 1)

    _rewards(axes, view, x, at)
    axes.set_xlabel("answers evaluated" if known else "members evaluated")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def time(axes: Axes, view: View) -> None:
    def before(run: Run) -> np.ndarray:
        return np.concatenate([[0.0], series.hours(run)])

    _rewards(axes, view, lambda run: before(run)[:-1], lambda run, g: before(run)[g])
    axes.set_xlabel("hours of computing")


def accuracy(axes: Axes, view: View) -> None:
    for shown in view.shown:
        generations, shares = shown.run.evaluated("held_out", "accuracy")
        style = {**_weight(shown), "marker": "" if shown.thin else "o", "ms": 4, "mfc": "white"}
        axes.plot(generations, 100 * shares, color=shown.colour, label=shown.label, **style)
    axes.set_xlabel("generation")
    axes.set_ylabel("accuracy, held-out prompts [%]")


def kl_plane(axes: Axes, view: View) -> None:
    for shown in view.shown:
        generations, kl = shown.run.evaluated("held_out", "kl")
        reward = dict(zip(*(column.tolist() for column in shown.run.evaluated("held_out"))))
        y = np.array([reward.get(g, np.nan) for g in generations.tolist()])
        axes.plot(kl, y, "-", color=shown.colour, alpha=0.5, lw=0.8 if shown.thin else 1.2)
        # Later generations are larger; of one run among many, there is room for the last only.
        size = 8 + 40 * np.arange(1, len(kl) + 1) / max(1, len(kl))
        first = -1 if shown.thin else 0
        axes.scatter(kl[first:], y[first:], size[first:], color=shown.colour, label=shown.label, lw=0)
    axes.set_xlabel("KL divergence to the initial model [nat/token]")
    axes.set_ylabel("reward, held-out prompts")


def phases(axes: Axes, view: View) -> None:
    if view.single:
        _phases_of_one(axes, view.single)
    else:
        _phases_of_many(axes, view)


def ranks(axes: Axes, view: View) -> None:
    if view.single:
        _ranks_of_one(axes, view.single)
        return
    for shown in view.shown:
        imbalance = series.smooth(shown.run.column("generation/imbalance"))
        axes.plot(np.arange(shown.run.committed), imbalance, color=shown.colour, label=shown.label,
                  **_weight(shown))  # fmt: skip
    axes.axhline(1, color="black", lw=0.6)
    axes.set_xlabel("generation")
    axes.set_ylabel("slowest rank's time / mean")


def members(axes: Axes, view: View) -> None:
    if len(view.runs) <= STRIPES:
        images = [series.sorted_rewards(run) for run in view.runs]
        _stripes(axes, view, images)
        axes.set_ylabel("members, best on top" if view.single else "members of each run, best on top")
    else:
        _lines_of_runs(axes, view)


def drift(axes: Axes, view: View) -> None:
    for shown in view.shown:
        expected = series.expected_drift(shown.run)
        label = _first(shown, view, "expected")
        axes.plot(np.arange(len(expected)), expected, color=shown.colour, label=label, **_weight(shown))
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
    both = [run.evaluated(split, "drift_l2") for split in ("train", "held_out")]
    generations = np.concatenate([g for g, _ in both])
    first = np.unique(generations, return_index=True)[1]
    return generations[first], np.concatenate([values for _, values in both])[first]


def _rewards(axes: Axes, view: View, x: Curve, at: Place) -> None:
    """Reward curves over x(run) (G,), and evaluations over at(run, their generations)."""
    for shown in view.shown:
        run = shown.run
        across, means = x(run), run.column("generation/reward_mean")
        if len(view.shown) <= 3:
            _spread(axes, across, means, run.column("generation/reward_std"), shown, view)
        _line(axes, across, means, shown, _first(shown, view, "mean of the members"))
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
    axes.plot(x, smooth, color=shown.colour, label=label or shown.label, **_weight(shown))


def _weight(shown: Shown) -> dict[str, float]:
    return {"lw": 0.6, "alpha": 0.45, "zorder": 1.5} if shown.thin else {"lw": 1.6, "zorder": 2}


def _evaluations(axes: Axes, view: View, shown: Shown, at: Place) -> None:
    """Unperturbed weights: circles on held-out prompts, and, where it is not too much, crosses on train."""
    if shown.thin:
        return
    splits = {"held_out": ("o", "unperturbed, held-out prompts")}
    if view.single:
        splits["train"] = ("x", "unperturbed, training prompts")
    for split, (marker, label) in splits.items():
        generations, rewards = shown.run.evaluated(split)
        if rewards.size:
            # Two points are no curve.
            axes.plot(at(shown.run, generations), rewards, marker, ls=":" if rewards.size > 2 else "",
                      lw=0.8, ms=4.5,
                      color="#D55E00" if view.single and split == "held_out" else shown.colour,
                      mfc="white", label=label if view.single else None, zorder=3)  # fmt: skip


def _mean_line(axes: Axes, group: Group, x: Curve, colour: str) -> None:
    """The mean over a group's runs, as far as all of them go."""
    length = min(run.committed for run in group.runs)
    rewards = [series.smooth(run.column("generation/reward_mean"))[:length] for run in group.runs]
    across = np.mean([x(run)[:length] for run in group.runs], axis=0)
    label = f"{cut(group.label)} ({len(group.runs)} runs)"
    axes.plot(across, np.mean(rewards, axis=0), color=colour, lw=2.2, label=label, zorder=3)


def _mean_evaluations(axes: Axes, group: Group, at: Place, colour: str) -> None:
    """The mean over a group's runs, at the generations at which all were evaluated."""
    found = [dict(zip(*(column.tolist() for column in run.evaluated("held_out")))) for run in group.runs]
    common = np.array(sorted(set.intersection(*(set(one) for one in found))), dtype=int)
    if common.size:
        across = np.mean([at(run, common) for run in group.runs], axis=0)
        rewards = np.mean([[one[g] for g in common.tolist()] for one in found], axis=0)
        axes.plot(across, rewards, "o", color=colour, ms=4, mfc="white", zorder=4)


def _first(shown: Shown, view: View, label: str) -> str | None:
    """A label that says what a line is, where there is one run; else the run's."""
    return label if view.single else shown.label


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
    axes.legend(handles[::-1], texts[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.02))


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
        axes.set_yticks(range(len(order)), [_short(view.shown[i].name) for i in order], fontsize=7)
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rank")
    axes.set_ylabel("evaluation time / mean of the ranks")


def _stripes(axes: Axes, view: View, images: list[np.ndarray]) -> None:
    """The images above one another, in one scale of colours."""
    low, high = _range(np.concatenate([image.ravel() for image in images]))
    top, gap = float(len(images)), 0.04 if len(images) > 1 else 0.0
    for image in images:
        top -= 1.0
        if image.size:
            extent = (-0.5, image.shape[1] - 0.5, top + gap, top + 1 - gap)
            drawn = _image(axes, image, extent, low, high)
    axes.set_yticks(np.arange(len(images)) + 0.5, [_short(s.name) for s in view.shown[::-1]], fontsize=7)
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
        axes.set_yticks(range(len(order)), [_short(view.shown[i].name) for i in order], fontsize=7)
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


def _short(name: str) -> str:
    return name if len(name) <= 22 else "..." + name[-19:]


def _any_generation(view: View) -> bool:
    return any(run.committed for run in view.runs)


def _has_accuracy(view: View) -> bool:
    return any(run.evaluated("held_out", "accuracy")[1].size for run in view.runs)


def _has_kl(view: View) -> bool:
    return any(run.evaluated("held_out", "kl")[1].size for run in view.runs)


def _has_ranks(view: View) -> bool:
    return any(run.committed and run.tables["start"]["world_size"].max() > 1 for run in view.runs)


PANELS = {
    "learning": Panel("Learning curve", learning, _any_generation),
    "answers": Panel("Reward against answers", answers, _any_generation),
    "time": Panel("Reward against time", time, _any_generation),
    "members": Panel("Rewards of all members", members, _any_generation),
    "ranks": Panel("Balance of the ranks", ranks, _has_ranks),
    "phases": Panel("Where the time goes", phases, _any_generation),
    "drift": Panel("Drift of the weights", drift, _any_generation),
    "accuracy": Panel("Accuracy", accuracy, _has_accuracy),
    "kl": Panel("Reward and KL divergence", kl_plane, _has_kl),
}
assert {*PHASES, "other"} == set(PHASE_COLOURS)
