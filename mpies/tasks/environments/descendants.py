"""What a process has started, in whatever group or session: found and killed.

A process that adopts is the parent of what its descendants leave behind, so that nothing gets out of its
sight. The kernel lists children on Linux; elsewhere, nothing is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1
ROUNDS = 100  # of looking for more, while a process may go on to start some
WAITING = 1.0  # seconds for one that was killed


try:
    _C: ctypes.CDLL | None = ctypes.CDLL(None)  # once: what an episode's process does, thousands do
except OSError:
    _C = None


def adopt() -> None:
    """Be the parent of orphans among one's descendants."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Linux's; elsewhere, nothing."""
    if prctl := getattr(_C, "prctl", None):
        prctl(option, value)


def children_of(pid: int) -> set[int]:
    """Of all its threads, those that have ended included."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def kill_descendants(pid: int) -> None:
    """All of them; the process itself should have been stopped."""
    for _ in range(ROUNDS):
        alive = [one for one in _tree(pid) if not _has_ended(one)]
        if not alive:
            return
        for one in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)


def kill_children(but: Collection[int]) -> set[int]:
    """Kill this process's own but these, with all that they have started, and wait for them. Those that
    cannot be killed."""
    immortal: set[int] = set()
    for _ in range(ROUNDS):  # what one leaves behind comes here
        left = children_of(os.getpid()) - set(but) - immortal
        if not left:
            break
        for one in left:
            kill_descendants(one)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
            if not wait(one, WAITING)[0]:
                immortal.add(one)
    return immortal


def wait(pid: int, seconds: float) -> tuple[bool, int]:
    """For a child that ends within some seconds: has it, and its status as of waitpid."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return True, 0
        if done or time.monotonic() >= deadline:
            return bool(done), status
        time.sleep(0.001)


def _tree(pid: int) -> set[int]:
    found: set[int] = set()
    level = {pid}
    while level:
        level = set().union(*map(children_of, level)) - found
        found |= level
    return found


def _has_ended(pid: int) -> bool:
    """Also one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True
