"""What figures and summaries show, as arrays: computed from a run's columns, tolerant of NaN."""

from __future__ import annotations

import math
from datetime import datetime

import numpy as np

from mpies.analyze.run import Run
from mpies.phases import PHASES
from mpies.splits import HELD_OUT, TRAIN


def phase_seconds(run: Run) -> dict[str, np.ndarray]:
    """Phase -> seconds per generation (G,), mean over ranks; "other" is the rest of rank 0's time.

    A generation's own `seconds` are taken before it is logged.
    """
    seconds = {phase: np.nan_to_num(run.column(f"generation/seconds_{phase}")) for phase in PHASES}
    known = sum(seconds[phase] for phase in PHASES if phase != "log")
    rest = np.nan_to_num(run.column("generation/seconds")) - known
    return {**seconds, "other": np.maximum(rest, 0.0)}


def hours(run: Run) -> np.ndarray:
    """Hours of computing (G,) up to each generation's end: without queues, loading, evaluations."""
    return np.cumsum(np.nan_to_num(run.column("generation/seconds"))) / 3600


def finished_at(run: Run) -> np.ndarray:
    """When each generation (G,) ended, in seconds since the epoch.

    Counted from the start that made it: evaluations and loading are not in it, so it is a little early.
    """
    start = run.tables["start"]
    seconds = np.nan_to_num(run.column("generation/seconds"))
    begun = np.array([datetime.fromisoformat(utc).timestamp() for utc in start["utc"]])
    made_by = _made_by(run)
    elapsed = np.cumsum(seconds)
    before = np.concatenate([[0.0], elapsed])[start["generation"]]
    return begun[made_by] + elapsed - before[made_by]


def prompts_per_member(run: Run) -> int | None:
    """The number of prompts that every member answers; None if the file does not tell.

    Without `task.prompts_per_generation`, all of them.
    """
    given = run.settings.get("task", {}).get("prompts_per_generation")
    return given if isinstance(given, int) and given > 0 else _prompts(run, TRAIN)


def held_out_prompts(run: Run) -> int | None:
    """The number of held-out prompts that an evaluation answers; None if the file does not tell."""
    return _prompts(run, HELD_OUT)


def _prompts(run: Run, split: str) -> int | None:
    """Of the split's evaluation of the initial model.

    Files of earlier versions have no row for each prompt: there, an evaluation kept min(run.keep_samples,
    prompts) answers, and where it kept fewer than it may, those are all.
    """
    every, kept = (
        int(np.count_nonzero((run.tables[table]["split"] == split) & (run.tables[table]["generation"] == 0)))
        for table in ("prompt", "sample")
    )
    most = run.settings.get("run", {}).get("keep_samples", 0)
    return every or (kept if 0 < kept < most else None)


def members_evaluated(run: Run) -> np.ndarray:
    """Members evaluated (G,) before each generation's own."""
    return run.population * np.arange(run.committed)


def rank_seconds(run: Run) -> np.ndarray:
    """Seconds that each rank spent on its members, (G, ranks); 0 where it had none."""
    ranks = run.column("member/rank").astype(int)
    width = max([int(ranks.max(initial=-1)) + 1, *run.tables["start"]["world_size"].tolist()])
    index = np.arange(run.committed)[:, None] * width + np.clip(ranks, 0, None)
    seconds = np.nan_to_num(run.column("member/seconds")).ravel()
    busy = np.bincount(index.ravel(), weights=seconds, minlength=run.committed * width)
    return busy.reshape(run.committed, width)


def idle_ranks(run: Run) -> np.ndarray:
    """The number of ranks (G,) that had no member to evaluate."""
    ranks = np.sort(run.column("member/rank"), axis=1)
    busy = 1 + np.count_nonzero(np.diff(ranks, axis=1), axis=1)
    return np.maximum(world_sizes(run) - busy, 0)


def world_sizes(run: Run) -> np.ndarray:
    """The number of ranks (G,) that each generation was made on."""
    return run.tables["start"]["world_size"][_made_by(run)]


def _made_by(run: Run) -> np.ndarray:
    """The start (G,) that made each generation: of several at one generation, the last."""
    begun = run.tables["start"]["generation"]
    return np.maximum(np.searchsorted(begun, np.arange(run.committed), side="right") - 1, 0)


def sorted_rewards(run: Run) -> np.ndarray:
    """Rewards (N, G): each generation's members from best to worst, unscored ones last.

    In this order, since a member's number means nothing from one generation to the next.
    """
    return -np.sort(-run.column("member/reward"), axis=1).T


def expected_drift(run: Run) -> np.ndarray:
    """Expected L2 distance (G + 1,) of the weights to the initial ones, after 0 to G updates.

    Every direction's noise is independent with variance 1 per parameter, so squared lengths add up:
    sqrt(parameters * sum over generations and directions of factor^2). With millions of parameters,
    the distance hardly differs from its expectation. Rounding and low-rank noise's correlations
    within a matrix do not change it.
    """
    factors = _direction_factors(run)
    steps = run.attributes["parameters"] * factors
    return np.sqrt(np.concatenate([[0.0], np.cumsum(steps)]))


def _direction_factors(run: Run) -> np.ndarray:
    """Sum of squared factors of each generation's directions (G,); members of a pair are one."""
    seeds = run.column("member/seed")
    terms = run.column("member/sign") * np.nan_to_num(run.column("member/coefficient").astype(float))
    first = np.ones(seeds.shape, dtype=bool)
    first[:, 1:] = seeds[:, 1:] != seeds[:, :-1]
    if not first.size:
        return np.zeros(run.committed)
    starts = np.flatnonzero(first)
    factors = np.add.reduceat(terms.ravel(), starts)
    return np.bincount(starts // run.population, weights=factors**2, minlength=run.committed)


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the values, NaN left out; the same length, where there are any.

    At both ends, over the part of the window that is there.
    """
    width = max(1, len(values) // 20)
    there = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(there, values, 0.0), window, mode="full")
    number = np.convolve(there.astype(float), window, mode="full")
    shift = (width - 1) // 2
    with np.errstate(invalid="ignore"):
        return (total / number)[shift : shift + len(values)]


def mean(values: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan


def last_mean(values: np.ndarray) -> float:
    """The mean of the last twentieth of the values."""
    return mean(values[len(values) - max(1, len(values) // 20) :])
