"""How numbers, sizes, durations and answers read on a screen, and what JSON can hold."""

from __future__ import annotations

import json
import math
from typing import Any


def count(number: int) -> str:
    """A number of parameters: 134.5 M, 7.62 B."""
    for unit, one in (("B", 1e9), ("M", 1e6)):
        if number >= one:
            return f"{number / one:.4g} {unit}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds as people read them: 4.1 ms, 3.4 s, 42 s, 12.5 min, 5.1 h, 3.2 days.

    From two of a unit on, in that unit.
    """
    for unit, one in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * one:
            return f"{seconds / one:.3g} {unit}"
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def size(number: float) -> str:
    """Bytes as people read them: 30.5 GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:.0f} B"


def clip(text: str, limit: int = 160) -> str:
    """A text on one line of at most `limit` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def printable(text: str) -> str:
    """The text without control characters: an answer is not to be trusted with the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def json_ready(value: Any) -> Any:
    """The same, of dictionaries and lists too, with None for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(content: dict[str, Any]) -> bytes:
    """A file's content: what `json_ready` makes of it, a value a line."""
    return (json.dumps(json_ready(content), indent=1, allow_nan=False) + "\n").encode()
