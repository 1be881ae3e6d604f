"""Groups of runs against each other: means over seeds, and what they prove."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpies.analyze import series
from mpies.analyze.groups import Group, group, seed_of
from mpies.analyze.run import Run
from mpies.errors import InputError
from mpies.splits import HELD_OUT

EXACT = 20_000  # rearrangements that are all gone through; of more, as many are drawn
TITLES = {
    HELD_OUT: "held-out reward at the last evaluation",
    "reward": "mean reward of the members, last twentieth of the generations",
}


@dataclass(frozen=True)
class ComparedGroup:
    """A group's metric over its seeds."""

    group: Group
    seeds: int
    values: list[float]
    """One per seed: of runs with the same seed and settings, which are no new evidence, the mean."""
    mean: float
    deviation: float
    """Sample standard deviation over seeds; NaN for one seed."""
    generations: tuple[int, int]
    """Fewest and most generations of the group's runs at which the metric was taken."""
    p: float
    """Against the first group: probability of a difference as large if the settings made none, corrected
    for the number of comparisons (Holm); NaN for the first group and for single seeds."""
    p_least: float
    """The smallest p that so many seeds and comparisons could give."""


@dataclass(frozen=True)
class Comparison:
    metric: str
    rows: list[ComparedGroup]
    """Highest mean first; groups in which nothing was measured last."""
    notes: list[str]

    @property
    def title(self) -> str:
        return TITLES.get(self.metric, f"{self.metric} on held-out prompts at the last evaluation")


def compare_runs(runs: list[Run], metric: str = HELD_OUT, at: int | None = None) -> Comparison:
    """Compare groups of runs by a metric: "held_out", the reward at the last evaluation on held-out
    prompts; "reward", the mean over members in the last twentieth of the generations; or a column of
    /evaluation, such as "accuracy".

    `at`: as if the runs had stopped at that generation. Raises InputError if nothing was measured.
    """
    taken = [_row(g, metric, at) for g in group(runs)]
    measured = [row for row in taken if row.values]
    if not measured:
        raise InputError(
            f"nothing to compare: no run has measured {metric}; --metric reward needs no evaluation"
        )
    measured.sort(key=lambda row: -row.mean)
    rows = [*_against_first(measured), *(row for row in taken if not row.values)]
    return Comparison(metric, rows, _notes(runs, rows))


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely is a difference of means as large, either way, if the labels meant nothing?

    Exact over all rearrangements of the values, or over 20,000 random ones. With three against three
    it cannot fall below 0.1: that is what three seeds can prove, and no distribution is assumed.
    """
    values = np.array([*a, *b], dtype=float)
    total, n = values.sum(), len(a)
    observed = abs(np.mean(a) - np.mean(b))
    ways = math.comb(len(values), n)
    if ways <= EXACT:
        picks = np.array(list(itertools.combinations(range(len(values)), n)))
    else:
        random = np.random.default_rng(0)
        picks = np.argsort(random.random((EXACT, len(values))), axis=1)[:, :n]
    first = values[picks].sum(axis=1)
    differences = abs(first / n - (total - first) / len(b))
    as_large = int(np.count_nonzero(differences >= observed - 1e-12 * max(1.0, abs(values).max())))
    return as_large / ways if ways <= EXACT else (as_large + 1) / (EXACT + 1)


def holm(ps: Sequence[float], comparisons: int) -> list[float]:
    """p values corrected for so many comparisons, by Holm's method; NaN stays."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    corrected, highest = list(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (comparisons - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def _row(g: Group, metric: str, at: int | None) -> ComparedGroup:
    by_seed: dict[int | None, list[float]] = {}
    where = []
    for run in g.runs:
        value, generation = _value(run, metric, at)
        if math.isfinite(value):
            by_seed.setdefault(seed_of(run), []).append(value)
            where.append(generation)
    values = [float(np.mean(same)) for same in by_seed.values()]
    return ComparedGroup(
        group=g,
        seeds=len(values),
        values=values,
        mean=float(np.mean(values)) if values else math.nan,
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        generations=(min(where), max(where)) if where else (0, 0),
        p=math.nan,
        p_least=math.nan,
    )


def _value(run: Run, metric: str, at: int | None) -> tuple[float, int]:
    """(value, generation at which it was taken)."""
    last = run.committed if at is None else min(at, run.committed)
    if metric == "reward":
        return series.last_mean(run.column("generation/reward_mean")[:last]), last
    column = "reward_mean" if metric == HELD_OUT else metric
    generations, values = run.evaluated(HELD_OUT, column)
    there = np.flatnonzero(generations <= last)
    return (float(values[there[-1]]), int(generations[there[-1]])) if there.size else (math.nan, 0)


def _against_first(rows: list[ComparedGroup]) -> list[ComparedGroup]:
    first = rows[0]
    ps, least = [], []
    for row in rows:
        enough = row is not first and first.seeds > 1 and row.seeds > 1
        ps.append(permutation_p(first.values, row.values) if enough else math.nan)
        least.append(_least_p(first.seeds, row.seeds) if enough else math.nan)
    # The first is the best, which was chosen after looking: any of the pairs might have been compared.
    groups = 1 + sum(not math.isnan(p) for p in ps)
    comparisons = groups * (groups - 1) // 2
    # NaN first: it stays.
    least = [min(comparisons * low, 1.0) for low in least]
    return [replace(row, p=p, p_least=low) for row, p, low in zip(rows, holm(ps, comparisons), least)]


def _least_p(a: int, b: int) -> float:
    """Of equally many, the mirror image counts too."""
    return (2 if a == b else 1) / math.comb(a + b, a)


def _notes(runs: list[Run], rows: list[ComparedGroup]) -> list[str]:
    """What a careful reader should be told."""
    notes = []
    spans = [row.generations for row in rows if row.values]
    low, high = min(a for a, _ in spans), max(b for _, b in spans)
    if low != high:
        notes.append(
            f"taken at different generations, {low} to {high}: --generation {low} compares all at one"
        )
    if any(row.seeds == 1 for row in rows):
        notes.append("a single seed has no spread: a difference from it proves nothing")
    weak = [row.p_least for row in rows if row.p_least > 0.05]
    if weak:
        notes.append(f"too few seeds: p cannot fall below {max(weak):.2g}, whatever the difference")
    for row in rows:
        if len(row.group.runs) > row.seeds > 0:
            notes.append(
                f"{row.group.label}: {len(row.group.runs)} runs of {row.seeds} seed(s); the same seed twice"
                " is no new evidence"
            )
        if not row.values:
            notes.append(f"{row.group.label}: nothing measured")
    if len({run.settings.get("task", {}).get("name") for run in runs}) > 1:
        notes.append("the runs are of different tasks: their rewards do not compare")
    return notes
