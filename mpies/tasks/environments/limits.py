"""What a call of the user's code may take, and how much it may say."""

from __future__ import annotations

from dataclasses import dataclass

# Calls that are under way at a time on a rank.
AT_ONCE = 8

# By the clock, a call may take so many times its CPU time: it may wait for something, or for its turn.
PATIENCE = 10

MEMORY = (
    2 * 2**30
)  # bytes that an episode may have beyond those that the user's module has when it is imported
FILE = 256 * 2**20  # bytes of a file that it writes
CHARACTERS = 100_000  # of an observation
REPLY = 2**22  # bytes of all that an episode's process answers to a call


DESCRIBING = 300  # s of CPU time to describe the tools in, once


@dataclass(frozen=True)
class Limits:
    """Of each call: CPU time and time by the clock, s."""

    cpu: int
    clock: float

    def of_call(self, name: str) -> Limits:
        """Of a call by its name: describing tools imports transformers."""
        return Limits.of(max(self.cpu, DESCRIBING)) if name == "describe" else self

    @classmethod
    def of(cls, seconds: int) -> Limits:
        """Where a call may take so many seconds of CPU time."""
        return cls(seconds, PATIENCE * seconds)
