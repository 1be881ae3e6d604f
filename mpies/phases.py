"""Where a generation's time goes: measured seconds per phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Phase -> what it is, in the words of the run file's columns.
DESCRIPTIONS = {
    "perturb": "writing perturbed live weights; mean over ranks",
    "generate": "generating completions; mean over ranks",
    "reward": "scoring completions; mean over ranks",
    "communicate": "exchanging (seed, reward) pairs and digests; mean over ranks",
    "wait": "waiting for the slowest rank; mean over ranks",
    "update": "replaying seeds into the base weights, and their digest; mean over ranks",
    "log": "writing the row before this one, which only rank 0 does",
}
PHASES = tuple(DESCRIPTIONS)


class Phases:
    """A stopwatch per phase, and one for the whole. `synchronize` waits for the device, so that its work is
    counted where it belongs; it does nothing on a CPU."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._synchronize = synchronize
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def begin(self) -> None:
        """A generation begins."""
        self._began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the generation began."""
        return time.perf_counter() - self._began

    def take(self) -> dict[str, float]:
        """The seconds since the last call, and start again from zero."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken
