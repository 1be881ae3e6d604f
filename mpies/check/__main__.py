from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import mpies.check
from mpies import config
from mpies.ranks import collectives, launch
from mpies.time_limit import seconds_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SHARE_GPUS = "--share-gpus"
NAMING = 15.0  # seconds of the job's time that are left when a rank or a reward that hangs is named


def be_done_in_time(comm: Comm, settings: config.Settings) -> None:
    """Wait for no one beyond the end of this job, which Slurm would end without a word. Collective."""
    left = collectives.on_root(comm, seconds_of, "auto")
    if left is not None:
        collectives.set_timeout(comm, min(settings.run.collective_timeout, max(left - NAMING, 1.0)))


def main(comm: Comm, arguments: list[str]) -> int:
    share_gpus = SHARE_GPUS in arguments
    arguments = [argument for argument in arguments if argument != SHARE_GPUS]
    settings = collectives.together(comm, config.load, arguments)
    collectives.agree(comm, settings)
    be_done_in_time(comm, settings)
    start = time.perf_counter()
    # Torch comes along: only once the settings are good. A job's start takes these seconds, too.
    from mpies.check import forecast, load, memory, ranks, rehearsal, storage
    from mpies.check.report import Report

    imports = time.perf_counter() - start
    report = Report(comm)

    report.check("MPI", ranks.world, comm)
    report.check("devices", ranks.places, comm, settings, share_gpus)
    report.check("clocks", ranks.clocks, comm)
    report.check("exchange", ranks.exchange, comm, settings)
    history = report.obtain("directory", storage.directory, comm, settings)
    task = report.obtain("task", load.task, comm, settings, history)
    there = report.obtain("memory", memory.reckon, comm, settings)
    if report.problems:
        return report.verdict()

    loaded = report.obtain("model", load.replica, comm, settings, task)
    if report.problems:
        return report.verdict()

    replica, anchor, seconds = loaded
    cost = report.obtain("evaluation", rehearsal.rehearse, comm, settings, replica, task, anchor)
    if cost:
        expected = forecast.forecast(settings, cost, comm.size, imports + seconds)
        limit = collectives.on_root(comm, seconds_of, settings.run.time_limit)
        report.check("generation", forecast.generation, expected)
        report.check("cache", forecast.memory, cost, replica, there)
        done = history.generations if history else 0
        report.check("time", forecast.run, settings, expected, limit, done)
    return report.verdict()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        if launch.is_first():
            print(f"{mpies.check.__doc__}\n{config.describe()}")
    else:
        launch.run(main, sys.argv[1:])
