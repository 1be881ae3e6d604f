"""The errors that end a program in an orderly way. Anything else is a failure with a traceback."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: the message is one clear line that names the remedy. Exit code 2."""


class RefusedError(InputError):
    """An `InputError` that every rank raises at the same point, so that all may leave together."""
