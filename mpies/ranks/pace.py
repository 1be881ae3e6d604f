"""How long ranks take for what they are handed, and whether a slow one should be handed more.

Times are seconds by one clock, whichever.
"""

from __future__ import annotations

import heapq

SLOW = 1.5  # times the mean, from which on a rank may be left out
WEIGHT = 0.2  # of the latest of a rank's times in their mean


class Paces:
    """What is known of ranks' times, from round to round."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._mean: float | None = None

    def note(self, rank: int, seconds: float) -> None:
        """A rank has taken so long for one."""
        self._seconds[rank] = _mixed(self._seconds.get(rank), seconds)
        self._mean = _mixed(self._mean, seconds)

    def should_have(self, rank: int, now: float, left: int, began: dict[int, float]) -> bool:
        """Should a rank have another of `left`?

        Not if it would still be at it when the others have done all that are left. `began`: since when every
        rank that has not been left out is at its latest one, this rank included.
        """
        mine, mean = self._seconds.get(rank), self._mean
        if mine is None or mean is None or mine < SLOW * mean or left * mean > mine * len(began):
            return True
        others = [(max(now, at + self._seconds.get(o, mean)), o) for o, at in began.items() if o != rank]
        if not others:
            return True
        heapq.heapify(others)
        for _ in range(left):
            free, other = others[0]
            heapq.heapreplace(others, (free + self._seconds.get(other, mean), other))
        return now + mine <= max(others)[0]


def _mixed(before: float | None, latest: float) -> float:
    return latest if before is None else before + WEIGHT * (latest - before)


class Round:
    """Numbers from 0 on, of which every rank r of `ranks` begins with number r, at the time `now`."""

    def __init__(self, ranks: int, now: float):
        self.owners = list(range(ranks))
        """Which rank has had which number."""
        self._began = dict.fromkeys(range(ranks), now)
        self._timed: set[int] = set()

    def give(self, rank: int, count: int, now: float, paces: Paces) -> int | None:
        """The next number below `count`, if there is one and this rank should have it; else it is out."""
        if rank in self._timed:  # when it began with its first is not known
            paces.note(rank, now - self._began[rank])
        left = count - len(self.owners)
        if left <= 0 or not paces.should_have(rank, now, left, self._began):
            self._began.pop(rank, None)
            return None
        self._timed.add(rank)
        self._began[rank] = now
        self.owners.append(rank)
        return len(self.owners) - 1
