"""Which blocks of members a rank evaluates: as they are handed out, or by a plan made beforehand.

No result depends on it: a block's rewards are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mpies.es.population import Member, Plan, Population
from mpies.phases import Phases
from mpies.ranks.handout import Handout

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

WITHOUT = (
    "run.assignment: static, since threads of this MPI library cannot hand out blocks; ranks may wait longer"
    " for one another"
)


class Assignment:
    """A rank's blocks, generation after generation; within a `with` block, dynamic if that is wanted.

    On one rank, and where there are no more blocks than ranks, nothing is handed out: that is static.
    """

    def __init__(
        self,
        comm: Comm,
        population: Population,
        phases: Phases,
        dynamic: bool,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.comm, self.population = comm, population
        self._phases, self._say = phases, say
        self._dynamic = dynamic and 1 < comm.size < population.block_count
        self._handout: Handout | None = None

    def __enter__(self) -> Assignment:
        """Collective. What does not work is told, and done without."""
        if self._dynamic:
            handout = Handout(self.comm)
            if handout.works():
                self._handout = handout
            else:
                handout.end()
                self._say(f"warning: {WITHOUT}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._handout:
            self._handout.end()
            self._handout = None

    @property
    def bytes_received(self) -> int:
        """By each rank in a generation, to know which blocks the others had."""
        return 4 * self.population.block_count if self._handout else 0

    def blocks(self, generation: int) -> Iterator[tuple[list[Member], int]]:
        """This rank's blocks, and about how many it has to evaluate from each on, that one included."""
        if self._handout is None:
            mine = self.population.plan(generation, self.comm.size).blocks[self.comm.rank]
            yield from zip(mine, range(len(mine), 0, -1), strict=True)
            return
        blocks = self.population.blocks(generation)
        number: int | None = self.comm.rank
        while number is not None:
            yield blocks[number], -(-(len(blocks) - number) // self.comm.size)
            with self._phases("wait"):
                number = self._handout.draw(generation, len(blocks))

    def plan(self, generation: int) -> Plan:
        """Who has evaluated whom, once all have. Collective."""
        if self._handout is None:
            return self.population.plan(generation, self.comm.size)
        with self._phases("communicate"):
            owners = self._handout.owners(generation, self.population.block_count)
        return self.population.plan_of(generation, self.comm.size, owners.tolist())
