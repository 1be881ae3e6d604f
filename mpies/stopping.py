"""When to stop early: signals and the time limit.

The first SIGUSR1, SIGUSR2, SIGTERM or SIGINT asks for a stop. A later SIGTERM or SIGINT ends the rank
at once; SIGUSR1 and SIGUSR2 may come again, as a batch script sends them until it is heard. A rank only
notes the wish; the ranks agree on stopping in the exchanges that they make anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from mpies.errors import InputError

REPEATABLE = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*REPEATABLE, signal.SIGTERM, signal.SIGINT)

# A second SIGINT ends a rank at once, but a launcher and a terminal may both deliver the first.
ECHO = 0.1

# What a prediction of a generation's time is multiplied with, plus seconds to write and leave.
SAFETY, LEAVE = 1.2, 5.0

TIME_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


class Stop:
    """Whether and how soon this rank has to stop. Times are seconds; `clock` counts them."""

    def __init__(self, limit: float | None, grace: float, clock=time.monotonic):
        self._clock = clock
        self._deadline = None if limit is None else clock() + limit
        self._grace = grace
        self._signalled: float | None = None
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
        elif number in REPEATABLE:
            return
        elif number != self._number or self._clock() - self._signalled > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

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


def announce() -> None:
    """Tell the job script that all ranks listen: make the file that MPIES_LISTENING names, if it is set."""
    name = os.environ.get("MPIES_LISTENING")
    if name:
        with contextlib.suppress(OSError):
            Path(name).touch()


def ignore(numbers: Iterable[signal.Signals]) -> None:
    """From now on, these signals do nothing."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def seconds_of(limit: str) -> float | None:
    """Seconds of `run.time_limit`: None for 'none'; 'auto': to the end of the Slurm job, if in one.

    Otherwise one of Slurm's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds. Raises InputError for anything else.
    """
    if limit == "auto":
        return _slurm_seconds_left()
    return None if limit == "none" else _parse(limit)


def check(limit: str) -> None:
    """Raise InputError if `seconds_of` would, without asking Slurm."""
    if limit not in ("auto", "none"):
        _parse(limit)


def _parse(text: str) -> float:
    match = TIME_LIMIT.fullmatch(text)
    if not match:
        raise InputError(
            f"run.time_limit: given {text!r}, allowed is auto, none, minutes, minutes:seconds,"
            " hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60.0 + seconds
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60.0 + seconds


def _slurm_seconds_left() -> float | None:
    """Seconds to the end of the Slurm job that this process runs in; None outside, or if unlimited."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return int(end) - time.time()
    command = ["squeue", "--noheader", "--job", job, "--format", "%L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    # squeue prints days-hours:minutes:seconds, hours:minutes:seconds or minutes:seconds.
    return _parse(answer) if TIME_LIMIT.fullmatch(answer) else None
