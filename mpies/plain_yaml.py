"""YAML as plain values, within bounds: a file is not trusted with memory, time or the screen."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML, YAMLError

from mpies.errors import InputError

LONGEST = 1_000_000  # characters of a text
MOST = 10_000  # values in it, those that aliases repeat included

_shortened = reprlib.Repr()
_shortened.maxlevel = 4
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 200
_shortened.maxlist = _shortened.maxtuple = _shortened.maxdict = _shortened.maxset = 8


def parse(text: str) -> Any:
    """What a YAML text says. Nothing in it is run.

    Raises InputError with the line and what is wrong; the caller says of which text.
    """
    if len(text) > LONGEST:
        raise InputError(f"it has more than {LONGEST:,} characters")
    try:
        # YAML 1.2, where 1e-3 is a number and `no` is a word.
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} " if mark else ""
        raise InputError(f"{where}not valid YAML ({_problem(error)})") from None
    for number, _ in enumerate(_walk(value), 1):
        if number > MOST:
            raise InputError(f"it holds more than {MOST:,} values, those that aliases repeat included")
    return value


def given(value: Any) -> str:
    """A value in a message: as Python writes it, shortened."""
    try:
        text = _shortened.repr(value)
    except ValueError:  # Python writes no such number
        return "a number of thousands of digits"
    return text if len(text) <= 400 else text[:397] + "..."


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets within brackets, too deep"
    words = getattr(error, "problem", None) or str(error)
    return words.splitlines()[0][:200]


def _walk(value: Any) -> Iterator[Any]:
    """The value and all that it holds; without end, if it holds itself."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
