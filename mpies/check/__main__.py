from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import mpies.check
from mpies import config, parallel

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SHARE_GPUS = "--share-gpus"


def main(comm: Comm, arguments: list[str]) -> int:
    share_gpus = SHARE_GPUS in arguments
    arguments = [argument for argument in arguments if argument != SHARE_GPUS]
    settings = parallel.together(comm, config.load, arguments)
    parallel.agree(comm, settings)
    start = time.perf_counter()
    # Torch comes along: only once the settings are good. A job's start takes these seconds, too.
    from mpies.check import forecast, load, memory, ranks, rehearsal, storage
    from mpies.check.report import Report
    from mpies.stopping import seconds_of

    imports = time.perf_counter() - start
    report = Report(comm)

    report.check("MPI", ranks.world, comm)
    report.check("devices", ranks.devices, comm, settings, share_gpus)
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

    replica, seconds = loaded
    cost = report.obtain("evaluation", rehearsal.rehearse, comm, settings, replica, task)
    if cost:
        expected = forecast.forecast(settings, cost, comm.size, imports + seconds)
        limit = parallel.on_root(comm, seconds_of, settings.run.time_limit)
        report.check("generation", forecast.generation, expected)
        report.check("cache", forecast.memory, cost, replica.weights, there)
        done = history.generations if history else 0
        report.check("time", forecast.run, settings, expected, limit, done)
    return report.verdict()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        if parallel.is_first():
            print(f"{mpies.check.__doc__}\n{config.describe()}")
    else:
        parallel.run(main, sys.argv[1:])
