"""The check, step by step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import mpies.check
from mpies import config
from mpies.command_line import fill
from mpies.ranks import launch
from mpies.ranks.agreement import agree_on_settings, on_root
from mpies.ranks.collectives import set_timeout
from mpies.run import inputs
from mpies.time_limit import seconds_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.check.report import Findings
    from mpies.replica import Replica

SHARE_GPUS = "--share-gpus"
NAMING = 15.0  # seconds of the job's time that are left when a rank or a reward that hangs is named


def main(comm: Comm, arguments: list[str]) -> int:
    share_gpus = SHARE_GPUS in arguments
    arguments = [argument for argument in arguments if argument != SHARE_GPUS]
    settings = agree_on_settings(comm, inputs.load_settings, arguments)
    be_done_in_time(comm, settings)
    start = time.perf_counter()
    # Torch comes along: only once the settings are good. A job's start takes these seconds, too.
    from mpies.check import forecast, load, memory, ranks, storage
    from mpies.check.report import Findings

    imports = time.perf_counter() - start
    found = Findings(comm)
    found.check("MPI", ranks.check_world, comm)
    found.check("devices", ranks.check_places, comm, settings, share_gpus)
    found.check("clocks", ranks.check_clocks, comm)
    found.check("exchange", ranks.check_exchange, comm, settings)
    history = found.obtain("directory", storage.check_directory, comm, settings)
    setup = found.obtain("task", load.check_setup, comm, settings, history)
    if setup:
        found.check("memory", memory.check_memory, comm, settings, setup)
    if found.problems:
        return found.verdict()

    loaded = found.obtain("model", load.check_model, comm, settings, setup, history)
    if loaded:
        replica, seconds = loaded
        done = history.generations if history else 0
        found.check("start", forecast.describe_start, imports, seconds)
        rehearse_and_forecast(found, settings, replica, setup.memory, imports + seconds, done)
    return found.verdict()


def rehearse_and_forecast(
    found: Findings, settings: config.Settings, replica: Replica, there: int, start: float, done: int
) -> None:
    """A block of members on every rank, and what follows from it; `start`: seconds, `there`: bytes."""
    from mpies.check import forecast, rehearsal

    comm = found.comm
    cost = found.obtain("evaluation", rehearsal.rehearse, comm, settings, replica)
    if cost:
        expected = forecast.forecast(settings, cost, replica.task, comm.size, start)
        limit = on_root(comm, seconds_of, settings.run.time_limit)
        found.check("generation", forecast.describe_generation, expected)
        found.check("cache", forecast.describe_memory, cost, replica, there)
        found.check("time", forecast.describe_run, settings, expected, limit, done)


def be_done_in_time(comm: Comm, settings: config.Settings) -> None:
    """Wait for no one beyond the end of this job, which Slurm would end without a word. Collective."""
    left = on_root(comm, seconds_of, "auto")
    if left is not None:
        set_timeout(comm, min(settings.run.collective_timeout, max(left - NAMING, 1.0)))


def show_help() -> None:
    print(f"{fill(mpies.check.__doc__ or '')}\n\n{config.describe()}")


if __name__ == "__main__":
    launch.start("check", main, show_help)
