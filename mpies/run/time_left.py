"""How long the generations take that are left: at the pace of the latest ones."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from mpies.run.stopping import RECENT


class Pace:
    """Of a job's generations: the median of the latest, the first left out, which warms up.

    There, kernels are compiled and caches filled. Of the others, one that was slow says little of the next.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._warm = False

    def note(self, seconds: float) -> None:
        """A generation took so long."""
        if self._warm:
            self._seconds.append(seconds)
        self._warm = True

    def seconds_of(self, generations: int) -> float:
        """Of so many generations more; NaN while the pace is not known."""
        if not generations:
            return 0.0
        return generations * median(self._seconds) if self._seconds else math.nan
