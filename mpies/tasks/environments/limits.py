"""What a call of the user's code may take, and how much it may say."""

from __future__ import annotations

from dataclasses import dataclass

# Calls that are under way at a time on a rank.
AT_ONCE = 8

# By the clock, a call may take so many times its CPU time: it may wait for something, or for its turn.
PATIENCE = 10

# Bytes that an episode may have beyond those that it begins with.
MEMORY = 2 * 2**30
FILE = 256 * 2**20  # bytes of a file that it writes
CHARACTERS = 100_000  # of an observation
REPLY = 2**22  # bytes of all that an episode's process answers to a call


# What describing the tools may take, once: s of CPU time, and bytes. It imports transformers, which imports
# torch, whose build for CUDA has many GB of addresses.
DESCRIBING, MEMORY_OF_DESCRIBING = 300, 2**40


@dataclass(frozen=True)
class Limits:
    """Of each call: CPU time and time by the clock, s; bytes."""

    cpu: int
    clock: float
    memory: int = MEMORY

    def of_call(self, name: str) -> Limits:
        """Of a call by its name."""
        if name != "describe":
            return self
        cpu = max(self.cpu, DESCRIBING)
        return Limits(cpu, PATIENCE * cpu, MEMORY_OF_DESCRIBING)

    @classmethod
    def of(cls, seconds: int) -> Limits:
        """Where a call may take so many seconds of CPU time."""
        return cls(seconds, PATIENCE * seconds)
