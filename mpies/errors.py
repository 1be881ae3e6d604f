"""The errors that end a program in an orderly way: one clear line that names the remedy, no traceback.

Anything else is a failure, with a traceback. `collective` errors are raised by every rank at the same
point, so that all may leave together; the others end the rank they occur on, which ends the job.
"""

from __future__ import annotations

import os
import sys
import traceback


class OrderlyError(Exception):
    status = 1
    collective = False


class InputError(OrderlyError):
    """Bad input."""

    status = 2


class RefusedError(InputError):
    """Bad input, known to every rank."""

    collective = True


class StorageError(OrderlyError):
    """The run file or the tuned model cannot be written."""


class DivergedError(OrderlyError):
    """The replicas are no longer equal."""

    collective = True


class MissingRankError(OrderlyError):
    """A rank did not arrive in time."""


class RankLeftError(OrderlyError):
    """A rank was ended from within, while others count on it."""


class HelperError(OrderlyError):
    """A process beside a rank cannot be had, or has ended."""


class StuckError(OrderlyError):
    """A call has not returned in time."""


def reason(error: BaseException) -> str:
    """What went wrong, in a few words: 'No space left on device'."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def show_traceback(error: BaseException) -> None:
    """With MPIES_TRACEBACK=1, print where an error that is told in a line comes from.

    A bug in a library that reads as bad input can be seen so.
    """
    if os.environ.get("MPIES_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
