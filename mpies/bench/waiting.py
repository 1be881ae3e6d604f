"""How long ranks wait for one that is slow, with blocks that sleep instead of computing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpies.es.population import Member, Population
from mpies.phases import Phases
from mpies.ranks.collectives import allgather_objects, barrier
from mpies.run.assignment import Assignment
from mpies.run.exchange import end_evaluation

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SLOWER = 3  # times longer that the last rank takes
LONGEST = 4  # units that a block takes, 1 at least


@dataclass(frozen=True)
class Waiting:
    """Of some generations: the share of the time that ranks wait, and how many blocks each has had."""

    share: float
    counts: list[int]


def units_of(block: list[Member]) -> int:
    """How long a block takes."""
    return 1 + block[0].seed % LONGEST


def measure(comm: Comm, dynamic: bool, blocks: int = 8, generations: int = 2, unit: float = 0.02) -> Waiting:
    """Generations of so many blocks a rank, by handing out or by a plan made beforehand. Collective.

    A block takes 1 to 4 units (seconds), and three times that on the last rank.
    """
    population, phases = Population(blocks * comm.size, seed=3), Phases()
    slower = SLOWER if comm.rank == comm.size - 1 else 1
    elapsed, counts = 0.0, np.zeros(comm.size, int)
    with Assignment(comm, population, phases, dynamic) as assignment:
        for generation in range(generations):
            barrier(comm)
            phases.begin()
            for block, _ in assignment.blocks(generation):
                time.sleep(unit * units_of(block) * slower)
            end_evaluation(comm, phases, complete=True)
            counts += assignment.plan(generation).counts
            elapsed += phases.elapsed
    waited = phases.take()["wait"]
    return Waiting(float(np.mean(allgather_objects(comm, waited / elapsed))), counts.tolist())
