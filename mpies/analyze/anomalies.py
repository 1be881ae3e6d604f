"""What a run's owner should know: each check looks at one thing and says it in a line, or nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from mpies.analyze import series
from mpies.analyze.learning import find_symptoms
from mpies.analyze.run import Run
from mpies.es.fitness import RELATIVE_SPREAD
from mpies.text import duration

# From here on, something is worth a line.
IMBALANCE = 1.25  # slowest rank's evaluation time over the mean
WAITING = 0.15  # share of time
SLOW = 1.5  # a rank's seconds per token over the median rank's


def find_anomalies(run: Run) -> list[str]:
    """One line per anomaly; empty for a run in order."""
    if not run.committed:
        return [*_damage(run), *_restarts(run)]
    checks = (
        _damage,
        _restarts,
        _unscored,
        _no_spread,
        _collapse,
        find_symptoms,
        _idle_ranks,
        _slow_ranks,
        _imbalance,
        _silence,
    )
    return [line for check in checks for line in check(run)]


def _damage(run: Run) -> Iterator[str]:
    if run.damage:
        yield run.damage


def _restarts(run: Run) -> Iterator[str]:
    starts = run.tables["start"]
    if len(starts["generation"]) > 1:
        at = ", ".join(str(g) for g in starts["generation"][1:6].tolist())
        more = ", ..." if len(starts["generation"]) > 6 else ""
        times = len(starts["generation"]) - 1
        yield f"restarted {f'{times} times' if times > 1 else 'once'}, at generation {at}{more}"
    sizes = list(dict.fromkeys(starts["world_size"].tolist()))
    if len(sizes) > 1:
        yield f"ranks changed: {', then '.join(map(str, sizes))}"


def _unscored(run: Run) -> Iterator[str]:
    unscored = np.isnan(run.column("member/reward")).sum(axis=1)
    if unscored.any():
        total, worst = int(unscored.sum()), int(unscored.argmax())
        share = 100 * total / (run.committed * run.population)
        yield (
            f"{total} of {run.committed * run.population} members unscored ({share:.3g} %),"
            f" most in generation {worst + 1}: {unscored[worst]}"
        )


def _no_spread(run: Run) -> Iterator[str]:
    rewards = run.column("member/reward")
    scored = np.isfinite(rewards)
    high = np.where(scored, rewards, -np.inf).max(axis=1)
    low = np.where(scored, rewards, np.inf).min(axis=1)
    size = np.maximum(np.abs(high), np.abs(low))
    same = scored.any(axis=1) & (high - low <= RELATIVE_SPREAD * size)
    flat = int(np.count_nonzero(same)) if run.population > 1 else 0
    if flat:
        yield f"in {flat} of {run.committed} generations all members got the same reward: no update"


def _collapse(run: Run) -> Iterator[str]:
    """The mean reward has lost more than half of what it had gained, and more than noise explains: that of
    members, and that of prompts which are others in each generation."""
    everything = run.column("generation/reward_mean")
    there = np.flatnonzero(np.isfinite(everything))
    if len(there) < 4:
        return
    means = everything[there]
    rewards = series.smooth(means)
    best, last = int(rewards.argmax()), rewards[-1]
    gained, lost = rewards[best] - rewards[0], rewards[best] - last
    members = np.median(np.nan_to_num(run.column("generation/reward_std"))) / np.sqrt(run.population)
    error = max(members, np.median(np.abs(np.diff(means))))  # of normal noise, 0.95 of its deviation
    if lost > max(gained / 2, 5 * error):
        where = there[best] + 1
        yield f"collapse: mean reward fell from {rewards[best]:.4g} (generation {where}) to {last:.4g}"


def _idle_ranks(run: Run) -> Iterator[str]:
    """By world size, since ranks take turns in being idle."""
    idle, sizes = series.idle_ranks(run), series.world_sizes(run)
    for size in np.unique(sizes[idle > 0]).tolist():
        mean = idle[sizes == size].mean()
        yield f"{mean:.3g} of {size} ranks idle in a generation, on average: too few blocks of members"


def _slow_ranks(run: Run) -> Iterator[str]:
    """Ranks that take longer per token, by the latest start's generations."""
    latest = slice(int(run.tables["start"]["generation"][-1]), None)
    ranks = run.column("member/rank")[latest].astype(int).ravel()
    if not ranks.size:
        return
    seconds = np.bincount(ranks, weights=np.nan_to_num(run.column("member/seconds"))[latest].ravel())
    tokens = np.bincount(ranks, weights=run.column("member/tokens")[latest].ravel())
    pace = np.divide(seconds, tokens, out=np.full(len(seconds), np.nan), where=tokens > 0)
    usual = np.nanmedian(pace) if np.isfinite(pace).any() else np.nan
    hosts = str(run.tables["start"]["hosts"][-1]).split(",")
    for rank in np.flatnonzero(pace > SLOW * usual)[:4]:
        where = f" on {hosts[rank]}" if rank < len(hosts) else ""
        yield f"rank {rank}{where} is slow: {pace[rank] / usual:.1f} x the usual time per token"


def _imbalance(run: Run) -> Iterator[str]:
    imbalance = series.mean(run.column("generation/imbalance"))
    phases = {phase: seconds.sum() for phase, seconds in series.phase_seconds(run).items()}
    waiting = phases["wait"] / (sum(phases.values()) or 1.0)
    if imbalance > IMBALANCE or waiting > WAITING:
        yield (
            f"imbalance: the slowest rank evaluates for {imbalance:.2f} x the mean time;"
            f" {100 * waiting:.0f} % of the time is waiting"
        )


def _silence(run: Run) -> Iterator[str]:
    """Nothing was written for much longer than a generation takes."""
    longest = np.nan_to_num(run.column("generation/seconds")[-20:]).max()
    silent = time.time() - run.written
    if run.committed < run.target and silent > 120 + 5 * longest:
        yield (
            f"stopped or hanging: nothing was written for {duration(silent)}, at generation"
            f" {run.committed} of {run.target}"
        )
