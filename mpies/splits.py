"""The two parts that a task's prompts are split into, by the names that run files and settings use."""

from __future__ import annotations

TRAIN = "train"
"""Its rewards move the weights."""
HELD_OUT = "held_out"
"""Is evaluated only."""


def spoken(split: str) -> str:
    """A split's name as people read it: held-out."""
    return split.replace("_", "-")
