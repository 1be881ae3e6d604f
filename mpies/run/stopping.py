"""When to stop early: signals and the time limit.

The first SIGUSR1, SIGUSR2, SIGTERM or SIGINT asks for a stop. A later SIGTERM or SIGINT ends the rank
at once; SIGUSR1 and SIGUSR2 may come again, as a batch script sends them until it is heard. A rank only
notes the wish; the ranks agree on stopping in the exchanges that they make anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from mpies.signals import REPEATABLE, SIGNALS, ignore

# A second SIGINT ends a rank at once, but a launcher and a terminal may both deliver the first.
ECHO = 0.1
HEARD = b"\nmpies: stops after this generation; Ctrl-C once more: at once, and nothing committed is lost\n"

# What a prediction of a generation's time is multiplied with, plus seconds to write and leave.
SAFETY, LEAVE = 1.2, 5.0
RECENT = 5  # latest generations that such a prediction, and the time left, come from


class Stop:
    """Whether and how soon this rank has to stop. Times are seconds; `clock` counts them."""

    def __init__(self, limit: float | None, grace: float, clock=time.monotonic, tells: bool = False):
        self._clock = clock
        self._tells = tells
        """Is who presses Ctrl-C told that it was heard?"""
        self.limit(limit)
        self._grace = grace
        self._signalled: float | None = None
        self._number: int | None = None
        """Of the signal that asked first."""
        self._urgent = False
        self.reason = ""

    def listen(self) -> None:
        """Install the signal handlers: after MPI's initialisation, which installs its own."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        # Python takes its handlers away before MPI's end, which may wait for other ranks.
        atexit.register(ignore, REPEATABLE)

    def _note(self, number: int, _frame) -> None:
        if self._signalled is None:
            self._signalled = self._clock()
            self._number = number
            self._urgent = number == signal.SIGTERM  # batch systems kill soon after it
            self.reason = f"signal {signal.Signals(number).name}"
            if number == signal.SIGINT and self._tells:
                os.write(sys.stderr.fileno(), HEARD)  # print() may be what was interrupted
        elif number in REPEATABLE:
            return
        elif number != self._number or self._clock() - self._signalled > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def limit(self, seconds: float | None) -> None:
        """From now on, there is so much time; None: no limit."""
        self._deadline = None if seconds is None else self._clock() + seconds

    @property
    def requested(self) -> bool:
        """Did a signal ask for a stop?"""
        return self._signalled is not None

    def fits(self, seconds: float) -> bool:
        """Is there time for work that is expected to take `seconds`?

        The time limit bounds it; after SIGTERM, and after other signals if there is no limit, the
        grace does.
        """
        now = self._clock()
        left = float("inf") if self._deadline is None else self._deadline - now
        if self._signalled is not None and (self._urgent or self._deadline is None):
            left = min(left, self._signalled + self._grace - now)
        if seconds * SAFETY + LEAVE <= left:
            return True
        self.reason = self.reason or "the time limit"
        return False


def announce(text: str = "") -> None:
    """Tell the job script that all ranks listen, or, by a text, that the run is complete.

    By the file that MPIES_LISTENING names, if it is set.
    """
    name = os.environ.get("MPIES_LISTENING")
    if name:
        with contextlib.suppress(OSError):
            Path(name).write_text(text)
