"""From rewards to coefficients: what each member's noise is multiplied with in the update.

Sums are exact (`math.fsum`), so that every machine gets the same bits whatever its vector width.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np

# Rewards that differ by less than this, relative to their size, differ by rounding only.
RELATIVE_SPREAD = 1e-12


def zscore(rewards: np.ndarray) -> np.ndarray:
    """Z_n = (R_n - mean) / standard deviation (paper, section 3), float64, shape (N,).

    NaN rewards ("could not be scored") are left out of mean and deviation and get 0. Without any
    spread, all are 0. The deviation is the population's (division by the number of scored members).
    """
    scored = [float(r) for r in rewards if math.isfinite(r)]
    if not scored:
        return np.zeros(len(rewards))
    # By a power of two, which is exact: squares neither overflow nor vanish.
    _, exponent = math.frexp(max(abs(r) for r in scored))
    small = [math.ldexp(r, -exponent) for r in scored]
    mean = math.fsum(small) / len(small)
    # d * d, since the last bit of d ** 2 depends on the platform's pow().
    deviation = math.sqrt(math.fsum((r - mean) * (r - mean) for r in small) / len(small))
    if deviation <= RELATIVE_SPREAD:
        return np.zeros(len(rewards))
    z = iter([(r - mean) / deviation for r in small])
    return np.array([next(z) if math.isfinite(r) else 0.0 for r in rewards])


def centered_rank(rewards: np.ndarray) -> np.ndarray:
    """rank / (S - 1) - 1/2 among the S scored members: from -1/2 to 1/2, float64, shape (N,).

    Equal rewards share their mean rank, NaN rewards get 0 (Salimans et al. 2017, arXiv 1703.03864,
    section 2.1). Whole numbers until one correctly rounded division, so any order of members gives the
    same bits.
    """
    scored = sorted(float(r) for r in rewards if math.isfinite(r))
    # Twice the mean rank of equals, which is whole: the ranks of the first and of the last of them.
    twice = {r: bisect_left(scored, r) + bisect_right(scored, r) - 1 for r in scored}
    last = len(scored) - 1
    return np.array([(twice[r] - last) / (2 * last) if last > 0 and r in twice else 0.0 for r in rewards])


FITNESS = {"zscore": zscore, "centered_rank": centered_rank}


def coefficients(rewards: np.ndarray, alpha: float, fitness: str = "zscore") -> np.ndarray:
    """alpha / N * Z_n as float32, shape (N,): theta <- theta + sum_n coefficient_n * eps_n.

    alpha has the estimator's 1/sigma absorbed (paper, section 3). N counts unscored members too,
    so that a generation with few scores takes a smaller step, not a larger one.
    """
    with np.errstate(over="ignore"):  # infinite coefficients make weights that are refused
        return (alpha / len(rewards) * FITNESS[fitness](rewards)).astype(np.float32)
