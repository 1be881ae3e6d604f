"""What a generation's answers say about why it learns, or not: pure functions of all members' answers.

A direction teaches by the difference between the rewards of its two members (of antithetic pairs), or between
members at all. Where answers are the same there is none; where answers differ and rewards do not, the reward
is too coarse, or the prompts are too few.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Answers:
    """A member's answers to a generation's prompts."""

    marks: np.ndarray
    """uint64 (prompts,): equal for equal answers, different (but for one pair in 2^64) for others."""
    rewards: np.ndarray
    """float64 (prompts,), NaN where not scored."""
    truncated: int = 0
    """Answers that ended because they were as long as they may be."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the answers that have them of what the task measures besides, by name."""


@dataclass(frozen=True)
class Agreement:
    """How far a generation's members agree. All are shares from 0 to 1, but for `distinct_answers`."""

    identical_pairs: float
    pairs_with_signal: float
    prompts_disagreeing: float
    distinct_answers: float
    """Different answers to a prompt, by mean over the prompts: 1 to N."""


def mark(text: str) -> int:
    """64 bits of BLAKE2b of an answer, the same on every rank."""
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


def compare(marks: np.ndarray, rewards: np.ndarray, of_members: np.ndarray, seeds: np.ndarray) -> Agreement:
    """marks uint64 and rewards float64 (N, prompts), NaN: not scored; members' rewards (N,), seeds (N,).

    Members with the same seed are an antithetic pair; where there are none, every two members are a pair.
    NaN where there is no pair (of scored members).
    """
    first, second = pairs(seeds)
    if len(first):
        same = marks[first] == marks[second]
        identical = float(same.mean()) if same.size else np.nan
        scored = np.isfinite(of_members[first] - of_members[second])
        differ = of_members[first[scored]] != of_members[second[scored]]
        signal = float(differ.mean()) if differ.size else np.nan
    else:
        identical = _mean([_coincidence(column) for column in marks.T])
        signal = 1 - _coincidence(of_members[np.isfinite(of_members)])
    return Agreement(
        identical_pairs=identical,
        pairs_with_signal=signal,
        prompts_disagreeing=_mean([len(np.unique(column[np.isfinite(column)])) > 1 for column in rewards.T]),
        distinct_answers=_mean([len(np.unique(column)) for column in marks.T]),
    )


def pairs(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members of the antithetic pairs: consecutive ones with the same seed, int64 (pairs,) each."""
    first = np.flatnonzero(seeds[1:] == seeds[:-1])
    return first, first + 1


def _coincidence(values: np.ndarray) -> float:
    """The share of pairs of different places that hold the same; NaN if there is no pair."""
    if len(values) < 2:
        return np.nan
    counts = np.unique(values, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1)).sum() / (len(values) * (len(values) - 1)))


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else np.nan
