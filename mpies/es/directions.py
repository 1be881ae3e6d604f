"""The terms of an update: a seed and a coefficient for each direction that the members went into.

The paper's update (section 3, with 1 / sigma in alpha) is theta + sum over members of coefficient * sign *
noise(seed). Consecutive members with the same seed, antithetic pairs, are one direction, so that its noise is
drawn once.
"""

from __future__ import annotations

import numpy as np


def directions(
    seeds: np.ndarray, signs: np.ndarray, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seeds uint64 (D,) and coefficients float32 (D,) of what an update adds: of those that are not 0.

    seeds uint64, signs, coefficients: (N,), in member order; D is at most N.
    """
    seeds = np.asarray(seeds, np.uint64)
    folded = fold(seeds, signs, coefficients).astype(np.float32)
    moved = folded != 0
    return seeds[_first(seeds)][moved], folded[moved]


def fold(seeds: np.ndarray, signs: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The coefficient of each direction, float64: the sum of its members' sign * coefficient."""
    seeds, terms = np.asarray(seeds, np.uint64), np.asarray(signs, float) * np.asarray(coefficients, float)
    return np.add.reduceat(terms, np.flatnonzero(_first(seeds))) if len(terms) else terms


def _first(seeds: np.ndarray) -> np.ndarray:
    """Is a member the first of its direction? bool (N,)"""
    return np.append(True, seeds[1:] != seeds[:-1])[: len(seeds)]
