"""Ranks: the MPI library, hosts, devices and cores; how far apart clocks are, how fast they exchange."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from mpies.check.report import Finding
from mpies.config import Settings
from mpies.ranks import agreement, collectives
from mpies.ranks.devices import Place, device_for, place_of, tell_differing_gpus
from mpies.ranks.gpu import make_ready
from mpies.run.exchange import PAIR
from mpies.text import duration, size

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# Seconds. Time limits and log files are read by several clocks.
SKEW = 2.0
SLOW_EXCHANGE = 1.0
PROBE = 2**20  # bytes from each rank
REPEATS = 5  # of which the median is told


def check_world(comm: Comm) -> list[Finding]:
    """The MPI library, the same on all ranks, and whether the launcher started all that Slurm allows."""
    from mpi4py import MPI

    library = MPI.Get_library_version().splitlines()[0].strip(" \0")
    agreement.require_equal(comm, {"library": library}, "MPI libraries")
    tasks = int(os.environ.get("SLURM_NTASKS") or 0)
    note = (
        f"the Slurm job has {tasks} tasks, but {comm.size} rank(s) were started" if tasks > comm.size else ""
    )
    words = " ".join(library.split())
    return [Finding("MPI", f"{words}, mpi4py {version('mpi4py')}, {comm.size} rank(s)", note=note)]


def check_places(comm: Comm, settings: Settings, share_gpus: bool) -> list[Finding]:
    """Ranks -> hosts -> devices and cores, a line per host."""
    device = agreement.together(comm, device_for, comm, settings.model.device)
    agreement.together(comm, make_ready, device)
    everyone = collectives.allgather_objects(comm, (place_of(device), os.sched_getaffinity(0)))
    hosts: dict[str, list[RankOnHost]] = {}
    for rank, (place, cores) in enumerate(everyone):
        hosts.setdefault(place.host, []).append(RankOnHost(rank, place, cores))
    found = [describe_host(name, ranks, settings.run.threads, share_gpus) for name, ranks in hosts.items()]
    note = tell_differing_gpus([place for place, _ in everyone])
    return [*found, Finding("GPUs", "of several models", note=note)] if note else found


@dataclass(frozen=True)
class RankOnHost:
    rank: int
    place: Place
    cores: set[int]
    """Numbers of those that it may use."""


def describe_host(name: str, ranks: list[RankOnHost], threads: int, share_gpus: bool) -> Finding:
    cores = len(set().union(*(rank.cores for rank in ranks)))
    named = ", ".join(f"{rank.rank} on {rank.place.device}" for rank in ranks)
    value = f"rank {named}; {cores} core(s)"
    problem, note = "", ""
    shared = [
        gpu for gpu, count in Counter(rank.place.gpu for rank in ranks if rank.place.gpu).items() if count > 1
    ]
    if shared and not share_gpus:
        both = " and ".join(str(rank.rank) for rank in ranks if rank.place.gpu == shared[0])
        problem = (
            f"ranks {both} are on one GPU of {name}: start as many ranks on a node as it has GPUs"
            " (--ntasks-per-node, --gpus-per-node), or give --share-gpus if this is wanted"
        )
    least = min(len(rank.cores) for rank in ranks)
    wanted = threads * len(ranks)
    if least < threads or cores < wanted:
        note = (
            f"{len(ranks)} rank(s) with run.threads={threads} want {wanted} cores, but have {cores} together"
            f" and {least} each: ask for more (--cpus-per-task), or bind ranks to cores differently"
        )
    elif sharing := find_sharing(ranks, threads):
        own = sorted(set().union(*(rank.cores for rank in sharing)))
        both = ", ".join(str(rank.rank) for rank in sharing)
        note = (
            f"ranks {both} share core(s) {', '.join(map(str, own))}, while others are free: bind each rank to"
            f" {threads} of its own (srun --cpu-bind=cores, mpirun --bind-to core)"
        )
    return Finding(name, value, problem, note)


def find_sharing(ranks: list[RankOnHost], threads: int) -> list[RankOnHost]:
    """The first ranks that are bound to cores too few for their threads; none, if all have enough."""
    for one in ranks:
        within = [rank for rank in ranks if rank.cores <= one.cores]
        if len(within) * threads > len(one.cores):
            return within
    return []


def check_clocks(comm: Comm) -> list[Finding]:
    """How far the hosts' clocks are apart."""
    collectives.barrier(comm)
    times = collectives.allgather_objects(comm, time.time())
    apart = max(times) - min(times)
    late, early = times.index(min(times)), times.index(max(times))
    note = ""
    if apart > SKEW:
        note = (
            f"{collectives.named(comm, [late])} is behind {collectives.named(comm, [early])}:"
            " tell your site; time limits are kept by rank 0's clock"
        )
    return [Finding("clocks", f"{duration(apart)} apart or less", note=note)]


def check_exchange(comm: Comm, settings: Settings) -> list[Finding]:
    """The allgather of a generation, and the bandwidth of a large one."""
    members = settings.es.population
    counts = [members // comm.size + (rank < members % comm.size) for rank in range(comm.size)]
    pairs = _seconds_of_allgather(comm, np.zeros(counts[comm.rank], PAIR), counts)
    probe = _seconds_of_allgather(comm, np.zeros(PROBE, np.uint8), [PROBE] * comm.size)
    value = (
        f"{members} members' rewards, {size(members * PAIR.itemsize)}: {duration(pairs)};"
        f" {size(comm.size * PROBE / probe)}/s for {size(PROBE)} from each rank"
    )
    slow = f"this should take milliseconds: see the MPI library's network settings ({duration(pairs)})"
    return [Finding("exchange", value, note=slow if pairs > SLOW_EXCHANGE else "")]


def _seconds_of_allgather(comm: Comm, rows: np.ndarray, counts: list[int]) -> float:
    seconds = []
    for _ in range(REPEATS):
        collectives.barrier(comm)
        start = time.perf_counter()
        collectives.allgather_rows(comm, rows, counts)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
