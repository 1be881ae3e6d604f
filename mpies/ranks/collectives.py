"""What ranks exchange, and how they wait for one another.

The communicator is an argument everywhere, and carries its ranks' patience. Waiting ranks sleep
between looks instead of burning a core, which the neighbours on a CPU node need. Those that wait too
long hold a roll call and end the job. Importing this module does not initialise MPI.
"""

from __future__ import annotations

import os
import pickle
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.errors import MissingRankError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Request


TAG_ARRIVAL, TAG_RELEASE = 1, 2


@dataclass(frozen=True)
class Patience:
    """How many seconds the ranks of a communicator wait for one another, and the hosts they are on."""

    timeout: float = float("inf")
    hosts: tuple[str, ...] = ()


def wait(*requests: Request, timeout: float = float("inf")) -> bool:
    """Wait for non-blocking operations without spinning: short sleeps first, then of 10 ms.

    Returns whether they were all done within `timeout` seconds.
    """
    pause, start = 1e-5, time.monotonic()
    for request in requests:
        while not request.Test():
            if time.monotonic() - start > timeout:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
    return True


def set_timeout(comm: Comm, timeout: float) -> None:
    """From now on, ranks give up waiting for one another after so many seconds. Collective."""
    comm.Set_attr(_patience_key(), Patience(timeout, hosts(comm)))


def patience(comm: Comm) -> Patience:
    """What `set_timeout` said; without it, ranks wait for ever."""
    found = comm.Get_attr(_patience_key())
    return found if isinstance(found, Patience) else Patience()


@cache
def _patience_key() -> int:
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


def barrier(comm: Comm, word: int = 0, *, timeout: float | None = None) -> int:
    """Wait until every rank is here; the largest of the words that they say, 0 to 127.

    Rank 0 collects a word from each rank and then releases all, so that it knows who is missing.
    Raises MissingRankError after `timeout` seconds (without it, the communicator's patience), with the
    missing ranks and their hosts.
    """
    timeout = patience(comm).timeout if timeout is None else timeout
    mine, answer = np.array([word], dtype=np.int8), np.zeros(1, dtype=np.int8)
    if comm.rank:
        arrival, release = comm.Isend(mine, 0, TAG_ARRIVAL), comm.Irecv(answer, 0, TAG_RELEASE)
        # Rank 0 reports first, unless it is the missing one.
        if not wait(arrival, release, timeout=timeout + 10):
            raise MissingRankError(f"{named(comm, [0])} has not arrived after {timeout:g} s, or cannot go on")
        return int(answer[0])
    words = [np.zeros(1, dtype=np.int8) for _ in range(1, comm.size)]
    arrivals = [comm.Irecv(theirs, rank, TAG_ARRIVAL) for rank, theirs in enumerate(words, 1)]
    if not wait(*arrivals, timeout=timeout):
        missing = [rank for rank, arrival in enumerate(arrivals, 1) if not arrival.Test()]
        raise MissingRankError(
            f"gave up after waiting {timeout:g} s for {named(comm, missing)}; if nothing is wrong with"
            " them, set a larger run.collective_timeout"
        )
    answer[0] = max(int(theirs[0]) for theirs in [mine, *words])
    wait(*(comm.Isend(answer, rank, TAG_RELEASE) for rank in range(1, comm.size)))
    return int(answer[0])


def named(comm: Comm, ranks: list[int]) -> str:
    """'rank 3 on node7, rank 4 on node8', and how many more."""
    hosts = patience(comm).hosts
    named = ", ".join(f"rank {r}" + (f" on {hosts[r]}" if hosts else "") for r in ranks[:8])
    return named + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _finish(comm: Comm, collective: Request) -> None:
    """Wait for a collective; after too long, hold a roll call: a barrier, which names who is missing.

    A rank that was done with the collective and went on comes to the roll call at its next barrier.
    """
    timeout = patience(comm).timeout
    if not wait(collective, timeout=timeout):
        barrier(comm)
        if collective.Test():
            raise MissingRankError(
                f"some rank came to an exchange more than {timeout:g} s after others; if nothing is wrong"
                " with it, set a larger run.collective_timeout"
            )
        raise MissingRankError(
            "an exchange did not end, though all ranks answer: see the MPI library or network"
        )


def allgather_rows(comm: Comm, rows: np.ndarray, counts: list[int]) -> np.ndarray:
    """All ranks' rows of a structured or plain dtype, in rank order; counts[r] = rows of rank r."""
    gathered = np.empty(sum(counts), dtype=rows.dtype)
    size = rows.dtype.itemsize
    receive = [gathered.view(np.uint8), [c * size for c in counts]]
    _finish(comm, comm.Iallgatherv(np.ascontiguousarray(rows).view(np.uint8), receive))
    return gathered


def gather_rows(comm: Comm, rows: np.ndarray, counts: list[int]) -> np.ndarray | None:
    """The same on rank 0 only; None elsewhere."""
    sent = np.ascontiguousarray(rows).view(np.uint8)
    if comm.rank:
        _finish(comm, comm.Igatherv(sent, None))
        return None
    gathered = np.empty(sum(counts), dtype=rows.dtype)
    receive = [gathered.view(np.uint8), [count * rows.dtype.itemsize for count in counts]]
    _finish(comm, comm.Igatherv(sent, receive))
    return gathered


def allgather_objects(comm: Comm, value: Any) -> list[Any]:
    """Every rank's (small, picklable) object, in rank order."""
    mine = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
    lengths = allgather_rows(comm, np.array([mine.size], dtype=np.int64), [1] * comm.size)
    joined = allgather_rows(comm, mine, lengths.tolist()).tobytes()
    ends = np.cumsum(lengths)
    return [pickle.loads(joined[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def host() -> str:
    """The name of this rank's node."""
    return os.uname().nodename


def hosts(comm: Comm) -> tuple[str, ...]:
    """All ranks' hosts. Collective the first time."""
    return patience(comm).hosts or tuple(allgather_objects(comm, host()))
