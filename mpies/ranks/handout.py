"""Numbers that are handed out to ranks as they ask for them, each to one rank.

MPI need not make progress while a rank computes: a one-sided counter stood still until its owner called MPI
again (MPICH, between nodes). So a thread of rank 0 answers, which needs MPI_THREAD_MULTIPLE, and is tried
before it is relied on. Importing this module does not initialise MPI.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from mpies.errors import MissingRankError
from mpies.ranks.collectives import barrier, broadcast_rows, named, patience, wait
from mpies.ranks.pace import Paces, Round

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

TAG_ASK, TAG_GIVE = 3, 4
NONE_LEFT = -1
TRIAL = -1  # a round that no generation has
TRIAL_TIMEOUT = 30.0  # seconds

# A request waits for the thread's next look. The longer none has come, the rarer it looks: seconds.
OFTEN, SELDOM, SHARE = 2e-4, 0.01, 0.02


class Handout:
    """Rounds of numbers: in each, rank r begins with number r, and the others go to whoever asks next.

    Near a round's end, a slow rank gets none that others would be done with sooner. A number is asked for
    in a message, which rank 0's thread answers in another. Rounds may overlap.
    """

    def __init__(self, comm: Comm):
        self.comm = comm
        self._lock = threading.Condition()
        self._rounds: dict[int, Round] = {}
        self._paces = Paces()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="handout", daemon=True)
        if comm.rank == 0 and _threads_may_call():
            self._thread.start()

    def draw(self, number: int, count: int, timeout: float | None = None) -> int | None:
        """The next of a round's numbers below `count`, for this rank alone; None: there is none left.

        Raises MissingRankError if rank 0 does not answer within `timeout` seconds (without it, the
        communicator's patience).
        """
        if self.comm.rank == 0:
            return self._give(0, number, count)
        timeout = patience(self.comm).timeout if timeout is None else timeout
        answer = np.empty(1, dtype=np.int64)
        given = self.comm.Irecv(answer, 0, TAG_GIVE)
        asked = self.comm.Isend(np.array([number, count], dtype=np.int64), 0, TAG_ASK)
        if not wait(asked, given, timeout=timeout):
            raise MissingRankError(f"{named(self.comm, [0])} has not answered for {timeout:g} s")
        return int(answer[0]) if answer[0] != NONE_LEFT else None

    def owners(self, number: int, count: int) -> np.ndarray:
        """int32 (count,): which rank had which number of a round, of which none is left. Collective.

        The round is over then.
        """
        with self._lock:
            mine = self._rounds.pop(number).owners if self.comm.rank == 0 else []
        assert self.comm.rank or len(mine) == count, "numbers are left"
        return broadcast_rows(self.comm, np.array(mine, dtype=np.int32), count)

    def works(self) -> bool:
        """Does it, tried by a draw of every rank while rank 0's main thread calls no MPI? Collective."""
        size, drawn = self.comm.size, None
        if _threads_may_call():
            with contextlib.suppress(MissingRankError):
                drawn = self.draw(TRIAL, 2 * size, TRIAL_TIMEOUT)
        if self.comm.rank == 0:
            with self._lock:
                owners = self._round(TRIAL).owners
                self._lock.wait_for(lambda: len(owners) == 2 * size, TRIAL_TIMEOUT if drawn else 0)
                owners += [NONE_LEFT] * (2 * size - len(owners))  # nobody had those
        good = drawn is not None
        good &= self.owners(TRIAL, 2 * size)[drawn or 0] == self.comm.rank
        return not barrier(self.comm, word=not good)

    def end(self) -> None:
        """No rank asks any more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _round(self, number: int) -> Round:
        return self._rounds.setdefault(number, Round(self.comm.size, time.monotonic()))

    def _give(self, rank: int, number: int, count: int) -> int | None:
        with self._lock:
            given = self._round(number).give(rank, count, time.monotonic(), self._paces)
            self._lock.notify_all()
            return given

    def _answer(self) -> None:
        """In rank 0's thread."""
        from mpi4py import MPI

        asked, status = np.empty(2, dtype=np.int64), MPI.Status()
        last = time.monotonic()
        while not self._over.is_set():
            if not self.comm.Iprobe(MPI.ANY_SOURCE, TAG_ASK, status):
                time.sleep(min(max((time.monotonic() - last) * SHARE, OFTEN), SELDOM))
                continue
            rank = status.Get_source()
            self.comm.Recv(asked, rank, TAG_ASK)
            given = self._give(rank, int(asked[0]), int(asked[1]))
            answer = np.array([NONE_LEFT if given is None else given], dtype=np.int64)
            wait(self.comm.Isend(answer, rank, TAG_GIVE))
            last = time.monotonic()


def _threads_may_call() -> bool:
    """Has MPI been initialised for calls from any thread at any time?"""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE
