"""Ranks and what they do together: collectives, refusing together, failing together, devices.

The communicator is an argument everywhere, and carries its ranks' patience. Waiting ranks sleep
between looks instead of burning a core, which the neighbours on a CPU node need. Those that wait too
long hold a roll call and end the job. Importing this module does not initialise MPI.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mpies.errors import InputError, MissingRankError, OrderlyError, RefusedError, reason

if TYPE_CHECKING:
    import torch
    from mpi4py.MPI import Comm, Request

    from mpies.config import Settings

TAG_ARRIVAL, TAG_RELEASE = 1, 2

# What launchers say about the number of ranks. They are believed over a communicator of size 1.
LAUNCHER_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE")

# A rank's number before MPI is initialised. Slurm's comes last: under mpirun, it numbers nodes.
LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")

START_TIMEOUT = 1800  # seconds, as long as the settings are not known


@dataclass(frozen=True)
class Patience:
    """How many seconds the ranks of a communicator wait for one another, and the hosts they are on."""

    timeout: float = float("inf")
    hosts: tuple[str, ...] = ()


def run(main: Callable[[Comm, list[str]], int], arguments: list[str]) -> NoReturn:
    """Run `main(communicator, arguments)` on every rank and exit with the status it returns.

    Whatever else ends `main` on one rank (an exception, sys.exit, an exception in a thread) ends all
    ranks, non-zero, with that rank's traceback on screen. Bad input ends with one line and status 2.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        _print_problem(
            f"no MPI library ({reason(error)}); load your site's MPI module, or: pip install mpich"
        )
        sys.exit(2)
    comm = MPI.COMM_WORLD
    threading.excepthook = lambda failure: _abort(comm, failure.exc_value)
    if comm.size > 1:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    try:
        _refuse_singletons(comm)
        set_timeout(comm, START_TIMEOUT)
        status = main(comm, arguments)
    except OrderlyError as error:
        if not error.collective:
            _abort(comm, error)
        if comm.rank == 0:
            _print_problem(str(error))
        status = error.status
    except BaseException as error:
        _abort(comm, error)
    sys.exit(status)


def is_first() -> bool:
    """Is this rank 0, as far as the launcher says? For what is printed without initialising MPI."""
    known = (os.environ[variable] for variable in LAUNCHER_RANKS if variable in os.environ)
    return next(known, "0") == "0"


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
    comm.Set_attr(_patience_key(), Patience(timeout, _hosts(comm)))


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


def _hosts(comm: Comm) -> tuple[str, ...]:
    """All ranks' hosts. Collective the first time."""
    return patience(comm).hosts or tuple(allgather_objects(comm, host()))


def local_rank(comm: Comm) -> tuple[int, int]:
    """This rank's number among the ranks on its node, and how many they are.

    By the names of their hosts: MPI's own split by node waits without end for a rank that hangs.
    """
    hosts = _hosts(comm)
    mine = hosts[comm.rank]
    return hosts[: comm.rank].count(mine), hosts.count(mine)


def device_for(comm: Comm, setting: str) -> torch.device:
    """The rank's device: its node-local number modulo the visible GPUs, or the CPU.

    Slurm's --gpus-per-task shows each rank only its own GPU, as device 0: hence the modulo.
    Raises InputError when `cuda` is asked for and no GPU is visible.
    """
    import torch

    visible = torch.cuda.device_count() if setting != "cpu" else 0
    index, _ = local_rank(comm)
    if visible:
        return torch.device("cuda", index % visible)
    if setting == "cuda":
        raise InputError("model.device: cuda was asked for, but no GPU is visible; use cpu or auto")
    return torch.device("cpu")


def diverged(digests: list[int]) -> list[int]:
    """The ranks whose digest is not the most frequent one (of equally frequent ones, the first)."""
    votes = {digest: digests.count(digest) for digest in digests}
    best = max(votes.values())
    truth = next(d for d in digests if votes[d] == best)
    return [rank for rank, digest in enumerate(digests) if digest != truth]


def _refuse_singletons(comm: Comm) -> None:
    """A launcher of another MPI starts N programs that each believe to be alone: refuse that."""
    if comm.size > 1:
        return
    for variable in LAUNCHER_SIZES:
        if int(os.environ.get(variable) or 1) > 1:
            raise RefusedError(
                f"{variable}={os.environ[variable]}, but this rank is alone: the launcher and mpi4py's"
                " MPI do not match. Launch with the mpirun of that MPI, or with the srun --mpi=... that"
                " fits it"
            )


def _end_with_launcher(parent: int) -> NoReturn:
    """End when the process that started this rank is gone.

    A launcher that dies leaves its ranks behind, and they would wait for one another for ever.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _print_problem(message: str) -> None:
    for line in message.splitlines():
        print(f"mpies: {line}", file=sys.stderr, flush=True)


def _abort(comm: Comm, error: BaseException) -> NoReturn:
    """Print why this rank ends and take all others along."""
    status = 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        status = error.code % 256 or 1  # what is left of it as an exit status, but never success
    if isinstance(error, OrderlyError):
        status = error.status
        _print_problem(f"rank {comm.rank}: {error}" if comm.size > 1 else str(error))
    else:
        text = "".join(traceback.format_exception(error))
        where = f"rank {comm.rank} of {comm.size} on {host()}"
        print(f"mpies: {where} failed and ends the job:\n{text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(0.5)  # the launcher forwards what was printed; an abort at once cuts off 1 in 20
    comm.Abort(status)
    os._exit(status)
