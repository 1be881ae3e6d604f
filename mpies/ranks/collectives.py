"""What ranks exchange, and how they wait for one another.

The communicator is an argument everywhere, and carries its ranks' patience. Waiting ranks sleep
between looks instead of burning a core, which the neighbours on a CPU node need. What they exchange are
MPI's own collectives, whose messages grow with the logarithm of the number of ranks; only where ranks have
waited too long does rank 0 call each of them, and end the job. Importing this module does not initialise MPI.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mpies.errors import MissingRankError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Request


TAG_CALL, TAG_PRESENT = 1, 2
LONGEST_SLEEP = 0.002  # seconds
SMALL = 2048  # bytes of an object, from which on a broadcast takes a second exchange
LETTER = np.dtype([("size", np.int64), ("text", np.uint8, SMALL)])
NAME = np.dtype("S256")  # of a host

# Seconds: to answer to the roll while one waits; that other ranks leave rank 0 to report before they do.
MISSING, REPORTING = 5.0, 10.0


@dataclass(frozen=True)
class Patience:
    """How many seconds the ranks of a communicator wait for one another, and the hosts they are on."""

    timeout: float = float("inf")
    hosts: tuple[str, ...] = ()


def wait(
    *requests: Request, timeout: float = float("inf"), meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Wait for non-blocking operations without spinning: short sleeps first, then of 2 ms.

    A tree of ranks hands on what it was sent at each rank's next look, so longer sleeps would add up. In
    waits of more than a tenth of a second, `meanwhile` is called at every look. Returns whether they were all
    done within `timeout` seconds.
    """
    pause, start = 1e-5, time.monotonic()
    for request in requests:
        while not request.Test():
            waited = time.monotonic() - start
            if waited > timeout:
                return False
            if waited > 0.1:
                meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_SLEEP)
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
    """Wait until every rank is here; the largest of the words that they say, 0 or more.

    Raises MissingRankError after `timeout` seconds (without it, the communicator's patience), with the
    missing ranks and their hosts.
    """
    return int(allreduce_max(comm, np.array([word], dtype=np.uint64), timeout=timeout)[0])


def allreduce_max(comm: Comm, values: np.ndarray, *, timeout: float | None = None) -> np.ndarray:
    """Wait until every rank is here; the largest that any brings of each value: uint64 (n,). As `barrier`."""
    from mpi4py import MPI

    largest = np.empty_like(values)
    _finish(comm, comm.Iallreduce(values, largest, MPI.MAX), timeout, MISSING)
    return largest


def depth(ranks: int) -> int:
    """Steps of a tree of ranks."""
    return (ranks - 1).bit_length()


def named(comm: Comm, ranks: list[int]) -> str:
    """'rank 3 on node7, rank 4 on node8', and how many more."""
    hosts = patience(comm).hosts
    named = ", ".join(f"rank {r}" + (f" on {hosts[r]}" if hosts else "") for r in ranks[:8])
    return named + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _finish(
    comm: Comm, collective: Request, timeout: float | None = None, grace: float | None = None
) -> None:
    """Wait for a collective, `timeout` seconds long (without it, the communicator's patience).

    Then rank 0 calls the roll, and gives the others `grace` seconds to answer, which they do while they
    wait for a collective. One that may be over for some ranks before the last has come leaves them to go
    on: then they answer at their next one, and the grace, unless given, is as long as the time-out.
    """
    timeout = patience(comm).timeout if timeout is None else timeout
    grace = timeout if grace is None else grace
    if comm.rank == 0:
        if not wait(collective, timeout=timeout):
            _call_the_roll(comm, collective, timeout, grace)
    elif not wait(collective, timeout=timeout + grace + REPORTING, meanwhile=lambda: _answer(comm)):
        raise MissingRankError(f"{named(comm, [0])} has not arrived after {timeout:g} s, or cannot go on")


def _answer(comm: Comm) -> None:
    """Say that this rank is there, if rank 0 asks."""
    if comm.Iprobe(0, TAG_CALL):
        called = np.empty(1, dtype=np.int8)
        wait(comm.Irecv(called, 0, TAG_CALL), comm.Isend(called, 0, TAG_PRESENT))


def _call_the_roll(comm: Comm, collective: Request, timeout: float, grace: float) -> NoReturn:
    """On rank 0: who does not answer is missing."""
    call, answers = np.zeros(1, dtype=np.int8), np.zeros(comm.size, dtype=np.int8)
    others = range(1, comm.size)
    present = [comm.Irecv(answers[rank : rank + 1], rank, TAG_PRESENT) for rank in others]
    called = [comm.Isend(call, rank, TAG_CALL) for rank in others]
    wait(*present, timeout=grace)
    missing = [rank for rank, answer in zip(others, present, strict=True) if not answer.Test()]
    del called  # what was not received need not be waited for
    if missing:
        raise MissingRankError(
            f"gave up after waiting {timeout:g} s for {named(comm, missing)}; if nothing is wrong with"
            " them, set a larger run.collective_timeout"
        )
    if collective.Test():
        raise MissingRankError(
            f"some rank came to an exchange more than {timeout:g} s after others; if nothing is wrong"
            " with it, set a larger run.collective_timeout"
        )
    raise MissingRankError("an exchange did not end, though all ranks answer: see the MPI library or network")


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


def broadcast_rows(comm: Comm, rows: np.ndarray, count: int) -> np.ndarray:
    """Rank 0's `count` rows, on every rank; others give any rows of the same dtype."""
    sent = np.array(rows) if comm.rank == 0 else np.empty(count, dtype=rows.dtype)
    _finish(comm, comm.Ibcast(sent.view(np.uint8), 0))
    return sent


def broadcast_object(comm: Comm, value: Any) -> Any:
    """Rank 0's (picklable) object, on every rank: in one exchange if it is small, else in two."""
    text = np.frombuffer(pickle.dumps(value) if comm.rank == 0 else b"", dtype=np.uint8)
    letter, head = np.zeros(1, dtype=LETTER), text[:SMALL]
    letter["size"], letter["text"][0, : head.size] = text.size, head
    ((size, head),) = broadcast_rows(comm, letter, 1)
    rest = broadcast_rows(comm, text[SMALL:], int(size) - SMALL) if size > SMALL else text[:0]
    return pickle.loads(head.tobytes() + rest.tobytes())


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
    known = patience(comm).hosts
    if known:
        return known
    named = allgather_rows(comm, np.array([host().encode()], dtype=NAME), [1] * comm.size)
    return tuple(name.decode() for name in named.tolist())
