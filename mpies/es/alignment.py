"""Which figure an update serves: its cosine with the update that the figure alone would have made.

Both are sums of the same noise vectors, one for each direction, that differ in the coefficients only. Noise
vectors of different seeds are nearly orthogonal and nearly equally long, antithetic members have exactly
opposite ones. So the cosine of two updates is that of their coefficients, and no weight is looked at. What is
neglected: of d parameters, two directions' noise has a cosine of about 1/sqrt(d), in low rank as well; its
squared length differs by sqrt(2/d) of itself from the mean with full noise, and of an m x n matrix by about
sqrt((2/m + 2/n) / r) of itself with noise of rank r. A cosine of D directions is therefore right within about
sqrt(D/d), and as much as its coefficients' lengths differ: 0.001 for 10^8 parameters and 100 directions.

That is about arithmetic. What a cosine says about the figure is limited by D: of figures that have nothing to
do with each other, the cosine is 1/sqrt(D) by chance.
"""

from __future__ import annotations

import math

import numpy as np

from mpies.es.directions import fold
from mpies.es.fitness import FITNESS


def cosine(
    seeds: np.ndarray, signs: np.ndarray, coefficients: np.ndarray, figure: np.ndarray, fitness: str
) -> float:
    """Of the update of these coefficients (N,) and that of the figure (N,), NaN where a member has none.

    The figure's own coefficients are made as the rewards' are (`fitness`). NaN if there is no update, or
    the figure is the same for all members.
    """
    own = FITNESS[fitness](figure)
    return _cosine(fold(seeds, signs, coefficients), fold(seeds, signs, own))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """By exact sums of vectors of size 1, the same on every machine."""
    sizes = [float(np.abs(v).max(initial=0.0)) for v in (one, other)]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    a, b = ((v / size).tolist() for v, size in zip((one, other), sizes, strict=True))
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    lengths = math.fsum(x * x for x in a), math.fsum(y * y for y in b)
    return max(-1.0, min(1.0, dot / math.sqrt(lengths[0] * lengths[1])))
