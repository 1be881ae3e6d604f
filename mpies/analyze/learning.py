"""Why a run learns, or not: what its answers tell, which figure its updates serve, which prompts changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mpies.analyze import series
from mpies.analyze.run import Run
from mpies.es import symptoms
from mpies.es.symptoms import ACCURACY, FAR, PARTS, PATIENCE, Course
from mpies.measure.statistics import over_prompts, sign_test
from mpies.runfile import COSINE
from mpies.runfile.schema import column_name
from mpies.splits import TRAIN
from mpies.tasks.rewards import parts_of

# Columns of /generation that tell of a generation's answers, and what they are called beside a number.
TOLD = {
    "identical_pairs": "of pairs answer alike",
    "pairs_with_signal": "of pairs have a signal",
    "prompts_disagreeing": "of prompts divide the members",
    "truncated": "of answers cut off",
}


@dataclass(frozen=True)
class Change:
    """What an evaluation has of a split's prompts that an earlier one had not."""

    split: str
    before: int
    """Generation of the earlier evaluation."""
    after: int
    by: str
    """What is compared: accuracy (fixed: right, and wrong before), or reward, where that is not measured."""
    prompts: int
    """With a value in both."""
    fixed: int
    """Better than before."""
    broken: int
    """Worse."""
    p: float
    """Of the exact two-sided sign test; for right and wrong answers that is McNemar's."""

    @property
    def net(self) -> int:
        return self.fixed - self.broken

    def text(self) -> str:
        words = ("fixed", "broken") if self.by == ACCURACY else ("better", "worse")
        return (
            f"{self.fixed} {words[0]}, {self.broken} {words[1]}, net {self.net:+d} of {self.prompts},"
            f" p {self.p:.2g}"
        )


def changes(run: Run, split: str) -> list[Change]:
    """Of each evaluation against the one before; of more than two, also of the last against the first."""
    values = _by_generation(run, split)
    pairs = list(pairwise(sorted(values)))
    if len(pairs) > 1:
        pairs.append((min(values), max(values)))
    found = (_change(split, before, after, values[before], values[after]) for before, after in pairs)
    return [change for change in found if change.prompts]


def changes_since_start(run: Run, split: str) -> list[Change]:
    """Of each evaluation against the first."""
    values = _by_generation(run, split)
    first, *later = sorted(values) or [0]
    found = (_change(split, first, after, values[first], values[after]) for after in later)
    return [change for change in found if change.prompts]


def _by_generation(run: Run, split: str) -> dict[int, dict[str, np.ndarray]]:
    """Generation -> {"accuracy", "reward"} of its prompts, float64 (prompts,), in their order."""
    table = run.tables["prompt"]
    rows = np.flatnonzero(table["split"] == split)
    rows = rows[np.lexsort((table["number"][rows], table["generation"][rows]))]
    generations = table["generation"][rows].astype(int)
    evaluations = np.split(rows, np.flatnonzero(np.diff(generations)) + 1) if len(rows) else []
    return {
        int(table["generation"][those[0]]): {n: table[n][those].astype(float) for n in (ACCURACY, "reward")}
        for those in evaluations
    }


def _change(split: str, before: int, after: int, one: dict, other: dict) -> Change:
    by = ACCURACY if all(np.isfinite(v[ACCURACY]).any() for v in (one, other)) else "reward"
    prompts = min(len(one[by]), len(other[by]))  # the training prompts that are evaluated are the first ones
    gained = other[by][:prompts] - one[by][:prompts]
    gained = gained[np.isfinite(gained)]
    fixed, broken = int((gained > 0).sum()), int((gained < 0).sum())
    return Change(split, before, after, by, len(gained), fixed, broken, sign_test(fixed, broken))


def told_lately(run: Run) -> dict[str, float]:
    """Column -> mean over the latest generations; what was not measured is left out."""
    columns = (*TOLD, "distinct_answers")
    found = {name: series.mean(run.column(f"generation/{name}")[-PARTS:]) for name in columns}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def cosines(run: Run) -> dict[str, np.ndarray]:
    """Figure -> cosine of its own update with the one that was made, float64 (G,)."""
    columns = run.tables["generation"]
    return {name.removeprefix(COSINE): columns[name] for name in columns if name.startswith(COSINE)}


def cosines_lately(run: Run) -> dict[str, float]:
    """Their means over the latest generations, the largest first; see `symptoms.latest_mean` for NaN."""
    found = {name: symptoms.latest_mean(values, 1) for name, values in cosines(run).items()}
    known = {name: mean for name, mean in found.items() if mean is not None}
    return dict(sorted(known.items(), key=lambda item: -abs(item[1])))


def find_symptoms(run: Run) -> Iterator[str]:
    """What a job's own advice says of the latest generations, and of all whether members were too far off."""
    task = run.settings.get("task", {})
    reward = task.get("reward")
    parts = parts_of(reward) if isinstance(reward, dict) else frozenset()
    course = Course(
        run.column("generation/identical_pairs"),
        run.column("generation/truncated"),
        cosines(run),
        frozenset(map(column_name, parts)),
        bool(task.get("expects")),
    )
    yield from _far_below(run, known_prompts=not task.get("prompts_per_generation"))
    yield from filter(None, (rule(course) for rule in symptoms.RULES.values()))


def _far_below(run: Run, known_prompts: bool) -> Iterator[str]:
    """`known_prompts`: do members answer the prompts that the unperturbed model is evaluated on?"""
    evaluated, unperturbed = run.evaluated(TRAIN)
    if not evaluated.size or run.committed < PATIENCE:
        return
    errors = {g: over_prompts(v["reward"][:, None]).error for g, v in _by_generation(run, TRAIN).items()}
    means, deviations = run.column("generation/reward_mean"), run.column("generation/reward_std")
    latest = np.searchsorted(evaluated, np.arange(run.committed), side="right") - 1
    far = [
        symptoms.is_far_below(
            means[: g + 1],
            deviations[: g + 1],
            unperturbed[latest[g]],
            0.0 if known_prompts else errors.get(int(evaluated[latest[g]]), math.nan),
        )
        for g in range(run.committed)
        if latest[g] >= 0
    ]
    if any(far):
        yield (
            f"{sum(far)} times, {PATIENCE} generations' members were more than {FAR:g} of their standard"
            " deviations worse than the unperturbed model: es.sigma is too large"
        )
