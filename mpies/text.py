"""How numbers, sizes, durations and answers read on a screen."""

from __future__ import annotations


def count(n: int) -> str:
    """A number of parameters: 134.5 M, 7.62 B."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return str(n)


def duration(seconds: float) -> str:
    """0:42 min, 3:07:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d} min"


def size(count: float) -> str:
    """Bytes as people read them: 30.5 GB."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"


def clip(text: str, limit: int = 160) -> str:
    """A text on one line of at most `limit` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def printable(text: str) -> str:
    """The text without control characters: an answer is not to be trusted with the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
