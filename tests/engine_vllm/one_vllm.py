"""One vLLM at a time in a process: its groups of ranks are the process's, and the first that ends ends them
for the others, whenever Python collects it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

Made = TypeVar("Made")

_kept: dict[Hashable, object] = {}


def alone(make: Callable[[], Made]) -> Made:
    """What `make` makes, after the vLLM before it has ended."""
    _kept.clear()
    gc.collect()
    return make()


def shared(key: Hashable, make: Callable[[], Made]) -> Made:
    """The same, kept for the tests that ask for it by this key, until another vLLM is made."""
    if key not in _kept:
        _kept[key] = alone(make)
    return _kept[key]
