"""The signals that ask a job to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterable

# A batch script sends these until they are heard; a second one of the others ends a rank at once.
REPEATABLE = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*REPEATABLE, signal.SIGTERM, signal.SIGINT)


def ignore(numbers: Iterable[signal.Signals]) -> None:
    """From now on, these signals do nothing."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
