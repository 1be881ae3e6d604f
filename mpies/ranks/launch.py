"""Starting the ranks' program and ending it: all ranks together, whatever happens on one of them.

Importing this module does not initialise MPI.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from mpies import extras
from mpies.command_line import INTERRUPTED, conduct_alone, tell
from mpies.errors import OrderlyError, RankLeftError, RefusedError, reason, show_traceback
from mpies.ranks.collectives import host, set_timeout

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# What launchers say about the number of ranks, the nearest first: mpirun may itself be a step of srun. They
# are believed over a communicator of size 1. SLURM_NTASKS is not among them: it is the allocation's.
LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")

# A rank's number before MPI is initialised. Slurm's comes last: under mpirun, it numbers nodes.
LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")

HELP = {"-h", "--help"}
START_TIMEOUT = 1800  # seconds, as long as the settings are not known
THREADS_GRACE = 3.0  # seconds that user code's threads have to end once the job is done

_really_exit = os._exit


def start(command: str, main: Callable[[Comm, list[str]], int], show_help: Callable[[], None]) -> NoReturn:
    """What `python -m mpies.COMMAND` does: `run(main, its arguments)`, or the help, if they ask for it.

    Neither help nor libraries that are missing, which are told in a line, need MPI or torch.
    """
    arguments = sys.argv[1:]

    def alone(arguments: list[str]) -> int:
        if not HELP & set(arguments):
            extras.require("train", f"python -m mpies.{command}")
        elif is_first():
            show_help()
        return 0

    status = conduct_alone(alone, arguments, quiet=not is_first())
    if status or HELP & set(arguments):
        sys.exit(status)
    run(main, arguments)


def run(main: Callable[[Comm, list[str]], int], arguments: list[str]) -> NoReturn:
    """Run `main(communicator, arguments)` on every rank and end the process with the status it returns.

    Whatever else ends `main` on one rank (an exception, sys.exit, os._exit, an exception in a thread) ends
    all ranks, non-zero, with that rank's traceback on screen. Bad input ends with one line and status 2,
    Ctrl-C with 130. Threads that user code has left behind do not keep the job alive.
    """
    _watch_exits()
    status = conduct(main, arguments)
    if MPI := sys.modules.get("mpi4py.MPI"):
        MPI.Finalize()
    threading.Thread(target=_outlive_threads, args=(status,), daemon=True).start()
    sys.exit(status)


def conduct(main: Callable[[Comm, list[str]], int], arguments: list[str]) -> int:
    """The status that all ranks end with, if they end together; else all are aborted from here."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        tell(f"no MPI library ({reason(error)}); load your site's MPI module, or: pip install mpich")
        return 2
    comm = MPI.COMM_WORLD
    threading.excepthook = lambda failure: _abort(comm, failure.exc_value or failure.exc_type())
    if comm.size > 1:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    try:
        _refuse_singletons(comm)
        set_timeout(comm, START_TIMEOUT)
        return main(comm, arguments)
    except OrderlyError as error:
        show_traceback(error)
        if not error.collective:
            _abort(comm, error)
        if comm.rank == 0:
            tell(str(error))
        return error.status
    except BaseException as error:
        _abort(comm, error)


def is_first() -> bool:
    """Is this rank 0, as far as the launcher says? For what is printed without initialising MPI."""
    known = (os.environ[variable] for variable in LAUNCHER_RANKS if variable in os.environ)
    return next(known, "0") == "0"


def _refuse_singletons(comm: Comm) -> None:
    """A launcher of another MPI starts N programs that each believe to be alone: refuse that.

    The launcher that started this process is the one to believe: inside an allocation of several tasks,
    `mpirun -n 1` and a plain `python` mean one rank.
    """
    if comm.size > 1:
        return
    spoken = next((variable for variable in LAUNCHER_SIZES if variable in os.environ), None)
    if spoken and int(os.environ[spoken] or 1) > 1:
        raise RefusedError(
            f"{spoken}={os.environ[spoken]}, but this rank is alone: the launcher and mpi4py's MPI do not"
            " match. Launch with the mpirun of that MPI, or with the srun --mpi=... that fits it"
        )


def _watch_exits() -> None:
    """os._exit ends this rank without a word, and some launchers then call the job a success: say it.

    Not in processes that were forked, which end so by right, and not where there is no MPI yet.
    """
    own, leave = os.getpid(), os._exit

    def leave_with_a_word(status: int) -> NoReturn:
        MPI = sys.modules.get("mpi4py.MPI")
        if os.getpid() == own and MPI and not MPI.Is_finalized():
            os._exit = leave
            caller = "".join(traceback.format_stack(limit=2)[:1]).strip().splitlines()[0]
            _abort(MPI.COMM_WORLD, RankLeftError(f"ended by os._exit({status}), called in {caller}"))
        leave(status)

    os._exit = leave_with_a_word


def _outlive_threads(status: int) -> None:
    """In a thread: where others, that user code has left, keep the ended process alive, end it and name them.

    Python itself would wait for them for ever.
    """
    time.sleep(THREADS_GRACE)
    left = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if left:
        names = ", ".join(sorted(left))
        tell(f"left running by the reward function or a library, and ended: {names}")
        sys.stdout.flush()
        _really_exit(status)


def _end_with_launcher(parent: int) -> NoReturn:
    """End when the process that started this rank is gone.

    A launcher that dies leaves its ranks behind, and they would wait for one another for ever.
    """
    while os.getppid() == parent:
        time.sleep(1)
    _really_exit(1)


def _abort(comm: Comm, error: BaseException) -> NoReturn:
    """Print why this rank ends and take all others along."""
    status = 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        status = error.code % 256 or 1  # what is left of it as an exit status, but never success
    if isinstance(error, KeyboardInterrupt):
        status = INTERRUPTED
        tell(f"rank {comm.rank}: interrupted")
    elif isinstance(error, OrderlyError):
        status = error.status
        tell(f"rank {comm.rank}: {error}" if comm.size > 1 else str(error))
    else:
        text = "".join(traceback.format_exception(error))
        where = f"rank {comm.rank} of {comm.size} on {host()}"
        print(f"mpies: {where} failed and ends the job:\n{text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(0.5)  # the launcher forwards what was printed; an abort at once cuts off 1 in 20
    comm.Abort(status)
    _really_exit(status)
