"""Calls into code that may never return, such as a user's reward function, end the job if they do not."""

from __future__ import annotations

import faulthandler
import importlib
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpies.errors import OrderlyError, StuckError
from mpies.ranks import collectives

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

PACKAGE = Path(__file__).parent.parent
GRACE = 5  # seconds for the line to be said, before the process is ended without a word

LONGEST = threading.TIMEOUT_MAX / 2


def watched(
    comm: Comm, function: Callable[..., Any], what: str, error: type[OrderlyError] = StuckError
) -> Callable[..., Any]:
    """The function, of which no call lasts longer than the communicator's patience.

    The ranks that wait would give up then, but there are none if all ranks make such a call, or if there
    is one rank only. Ends the job with `error`, a line that says where the call is. Native code that holds
    Python's lock, as regular expressions do, lets no thread say it: then the process ends with the
    traceback that Python's fault handler prints. Not for calls within one another.
    """
    limit = collectives.patience(comm).timeout

    def call(*arguments: Any, **named: Any) -> Any:
        timer = threading.Timer(min(limit, LONGEST), _give_up, (what, limit, threading.get_ident(), error))
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(min(limit, LONGEST) + GRACE, exit=True, file=2)
        try:
            return function(*arguments, **named)
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    return call


def _give_up(what: str, limit: float, thread: int, error: type[OrderlyError]) -> None:
    """In the timer's thread, where an exception ends the job."""
    raise error(
        f"{what} has not returned after {limit:g} s; it is in {place(thread)}. If it only needs longer, set"
        " a larger run.collective_timeout"
    )


def place(thread: int) -> str:
    """Where a thread is in code that is not ours: 'reward (rewards.py line 8) > get (api.py line 73)'."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    called = max((i for i, frame in enumerate(frames) if frame.filename == __file__), default=-1) + 1
    inner = frames[called:]
    theirs = [frame for frame in inner if not _is_ours(frame.filename)] or inner
    return " > ".join(f"{f.name} ({Path(f.filename).name} line {f.lineno})" for f in theirs)


def _is_ours(file: str) -> bool:
    """Is it the program's, or what Python imports by? Else it is what a user looks for."""
    importing = file.startswith("<frozen importlib") or Path(file).parent == Path(importlib.__file__).parent
    return importing or PACKAGE in Path(file).parents
