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
ROUNDS = 100  # of looking for more, while a process may go on to start some


def adopt() -> None:
    """Be the parent of orphans among one's descendants."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


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
            if not wait(one)[0]:
                immortal.add(one)
    return immortal


def wait(pid: int) -> tuple[bool, int]:
    """For a child that ends now: has it, and its status as of waitpid."""
    for _ in range(1000):
        with contextlib.suppress(ChildProcessError):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                time.sleep(0.001)
                continue
            return True, status
        return True, 0
    return False, 0


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
