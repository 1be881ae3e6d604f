"""Timing cases in turns, so that a machine's slow minutes hit all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Case:
    """A call that does so many units of work, and what has to be done before it, untimed."""

    call: Callable[[], object]
    units: float = 1
    before: Callable[[], object] = lambda: None


@dataclass
class Timings:
    """Seconds per unit of work of each case, a number per repeat."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, case: str) -> float:
        """The median."""
        return statistics.median(self.seconds[case])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer `slow` takes: the median of the repeats' ratios."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def in_turns(
    cases: dict[str, Case],
    repeats: int,
    synchronize: Callable[[], None],
    say: Callable[[str], None] = lambda _: None,
    warm: Callable[[], object] = lambda: None,
) -> Timings:
    """Time every case `repeats` times, in turns, after one round that is not counted, and then `warm()`."""
    timings = Timings({name: [] for name in cases})
    for turn in range(repeats + 1):
        for name, case in cases.items():
            say(f"{name}: {turn} of {repeats}" if turn else f"{name}: warming up")
            case.before()
            synchronize()
            start = time.perf_counter()
            case.call()
            synchronize()
            if turn:
                timings.seconds[name].append((time.perf_counter() - start) / case.units)
        if not turn:
            warm()
    return timings
