"""Ranks and what they do together: collectives, refusing together, failing together, devices.

The communicator is an argument everywhere, and carries its ranks' patience. Waiting ranks sleep
between looks instead of burning a core, which the neighbours on a CPU node need. Those that wait too
long hold a roll call and end the job. Importing this module does not initialise MPI.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.errors import InputError, MissingRankError, RefusedError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Request

    from mpies.config import Settings

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
    return comm.Get_attr(_patience_key()) or Patience()


@cache
def _patience_key() -> int:
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


def barrier(comm: Comm, timeout: float | None = None) -> None:
    """Wait until every rank is here.

    Rank 0 collects a word from each rank and then releases all, so that it knows who is missing.
    Raises MissingRankError after `timeout` seconds (without it, the communicator's patience), with the
    missing ranks and their hosts.
    """
    timeout = patience(comm).timeout if timeout is None else timeout
    word = np.zeros(1, dtype=np.int8)
    if comm.rank:
        arrival, release = comm.Isend(word, 0, TAG_ARRIVAL), comm.Irecv(word.copy(), 0, TAG_RELEASE)
        # Rank 0 reports first, unless it is the missing one.
        if not wait(arrival, release, timeout=timeout + 10):
            raise MissingRankError(f"{named(comm, [0])} has not arrived after {timeout:g} s, or cannot go on")
        return
    arrivals = [comm.Irecv(word.copy(), rank, TAG_ARRIVAL) for rank in range(1, comm.size)]
    if not wait(*arrivals, timeout=timeout):
        missing = [rank for rank, arrival in enumerate(arrivals, 1) if not arrival.Test()]
        raise MissingRankError(
            f"gave up after waiting {timeout:g} s for {named(comm, missing)}; if nothing is wrong with"
            " them, set a larger run.collective_timeout"
        )
    wait(*(comm.Isend(word, rank, TAG_RELEASE) for rank in range(1, comm.size)))


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
    size = rows.dtype.itemsize
    gathered = np.empty(sum(counts), dtype=rows.dtype) if comm.rank == 0 else None
    receive = [gathered.view(np.uint8), [c * size for c in counts]] if comm.rank == 0 else None
    _finish(comm, comm.Igatherv(np.ascontiguousarray(rows).view(np.uint8), receive))
    return gathered


def allgather_objects(comm: Comm, value: Any) -> list[Any]:
    """Every rank's (small, picklable) object, in rank order."""
    mine = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
    lengths = allgather_rows(comm, np.array([mine.size], dtype=np.int64), [1] * comm.size)
    joined = allgather_rows(comm, mine, lengths.tolist()).tobytes()
    ends = np.cumsum(lengths)
    return [pickle.loads(joined[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def together(comm: Comm, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
    """Call the function on every rank; bad input on any of them is refused by all of them.

    Raises MissingRankError if a rank takes `timeout` seconds (without it, the communicator's patience)
    longer than rank 0.
    """
    result, problem = _attempt(function, *arguments)
    barrier(comm, timeout)
    problems = allgather_objects(comm, problem)
    first = next((rank for rank, text in enumerate(problems) if text), None)
    if first is None:
        return result
    alone = "" if len(set(problems)) == 1 else f"rank {first}: "
    raise RefusedError(alone + problems[first])


def on_root(comm: Comm, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function on rank 0 only and return its (small) result everywhere."""
    result, problem = None, None
    if comm.rank == 0:
        result, problem = _attempt(function, *arguments)
    result, problem = allgather_objects(comm, (result, problem))[0]
    if problem:
        raise RefusedError(problem)
    return result


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """The function's result, or what it says of bad input."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)


def require_equal(comm: Comm, facts: dict[str, Any], what: str) -> None:
    """Refuse to go on when any of the facts differs between ranks, naming the ranks that differ."""
    everyone = allgather_objects(comm, facts)
    for key in sorted(set().union(*everyone)):
        for rank, theirs in enumerate(everyone):
            if theirs.get(key) != everyone[0].get(key):
                raise RefusedError(
                    f"{what} differ between ranks: {key} is {everyone[0].get(key)!r} on rank 0"
                    f" and {theirs.get(key)!r} on rank {rank}"
                )


def agree(comm: Comm, settings: Settings) -> None:
    """Refuse settings that differ between ranks, and be as patient from now on as they say. Collective."""
    require_equal(comm, settings.flat(), "settings")
    set_timeout(comm, settings.run.collective_timeout)


def host() -> str:
    """The name of this rank's node."""
    return os.uname().nodename


def hosts(comm: Comm) -> tuple[str, ...]:
    """All ranks' hosts. Collective the first time."""
    return patience(comm).hosts or tuple(allgather_objects(comm, host()))


def diverged(digests: list[int]) -> list[int]:
    """The ranks whose digest is not the most frequent one (of equally frequent ones, the first)."""
    votes = {digest: digests.count(digest) for digest in digests}
    best = max(votes.values())
    truth = next(d for d in digests if votes[d] == best)
    return [rank for rank, digest in enumerate(digests) if digest != truth]
