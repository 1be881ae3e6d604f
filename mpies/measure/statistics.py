"""Figures of an evaluation with their standard errors, over prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error, NaN where it cannot be told (one prompt, nothing measured)."""

    mean: float
    error: float = math.nan


def mean(values: np.ndarray) -> float:
    """The mean of the numbers among the values; NaN if there are none."""
    finite = [value for value in np.ravel(values).tolist() if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def over_prompts(values: np.ndarray) -> Figure:
    """The mean over prompts of the mean over a prompt's answers: float64 (prompts, samples), NaN left out.

    The error is the prompts' standard deviation / sqrt(prompts): answers to the same prompt are alike,
    so it is the number of prompts that tells how sure the mean is.
    """
    means = [m for m in (mean(row) for row in values) if math.isfinite(m)]
    if len(means) < 2:
        return Figure(mean(np.array(means)))
    centre = math.fsum(means) / len(means)
    variance = math.fsum((m - centre) ** 2 for m in means) / (len(means) - 1)
    return Figure(centre, math.sqrt(variance / len(means)))


def per_token(sums: np.ndarray, tokens: np.ndarray) -> Figure:
    """sum of sums / sum of tokens, both (prompts, samples), and its error as a ratio of prompts' totals.

    The error is that of the ratio estimator (Cochran 1977, "Sampling techniques", section 6.4).
    """
    s, n = sums.sum(axis=1), tokens.sum(axis=1)
    total, prompts = math.fsum(n.tolist()), len(n)
    if total == 0:
        return Figure(math.nan)
    ratio = math.fsum(s.tolist()) / total
    if prompts < 2:
        return Figure(ratio)
    squares = math.fsum(((s - ratio * n) ** 2).tolist())
    return Figure(ratio, math.sqrt(squares * prompts / (prompts - 1)) / total)


def pass_at(right: np.ndarray, k: int) -> Figure:
    """The chance that at least one of k answers is right: right float64 (prompts, samples), 1 where one is.

    NaN, an answer that could not be scored, is left out, and a prompt with fewer than k others, too. Of c
    right ones among n, 1 - C(n - c, k) / C(n, k): unbiased, which 1 - (1 - c/n)^k is not (Chen et al. 2021,
    arXiv 2107.03374, section 2.1). Whole numbers until one division.
    """
    scored = [int(n) for n in np.isfinite(right).sum(axis=1)]
    counts = [int(c) for c in (right == 1).sum(axis=1)]
    chances = [
        1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan
        for n, c in zip(scored, counts, strict=True)
    ]
    return over_prompts(np.array(chances)[:, None])


def sign_test(better: int, worse: int) -> float:
    """p of the two-sided exact sign test: were better and worse prompts equally likely?

    With right and wrong answers that is McNemar's exact test (McNemar 1947): prompts without a change
    tell nothing. Whole numbers until one division. 1 where nothing changed.
    """
    changed = better + worse
    tail = ways = 1  # C(changed, 0)
    for i in range(min(better, worse)):
        ways = ways * (changed - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def pass_ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself; none without several samples."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []
