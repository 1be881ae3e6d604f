"""The population: seeds and signs of members, blocks of members, and which rank evaluates which block.

All of it is a pure function of the settings and the generation; nothing is stored or exchanged. A
block is the unit of evaluation: its members are evaluated together, by one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mpies.noise.definition import STREAM_SEEDS, philox


@dataclass(frozen=True)
class Member:
    """One perturbed model of a generation: theta + sigma * sign * noise(seed)."""

    index: int
    seed: int
    sign: int


@dataclass(frozen=True)
class Population:
    """`size` members per generation, whose seeds derive from `seed` (es.seed, below 2^64)."""

    size: int
    seed: int
    antithetic: bool = False
    block: int = 1

    def members(self, generation: int) -> list[Member]:
        """The members of a generation, in member order.

        seed = the first 64 bits of Philox(key=es.seed; counter=(index, generation, stream 1)), where
        antithetic members 2j and 2j+1 use index j and signs +1 and -1.
        """
        return list(_members(self, generation))

    @property
    def block_count(self) -> int:
        """Blocks of a generation."""
        return -(-self.size // self.block)

    def blocks(self, generation: int) -> list[list[Member]]:
        """The members in blocks of `block`, the last one possibly shorter."""
        members = self.members(generation)
        return [members[i : i + self.block] for i in range(0, self.size, self.block)]

    def plan(self, generation: int, ranks: int) -> Plan:
        """Who evaluates whom in a generation. Ranks take turns in having one block more than others."""
        owners = [(block + generation) % ranks for block in range(self.block_count)]
        return self.plan_of(generation, ranks, owners)

    def plan_of(self, generation: int, ranks: int, owners: Sequence[int]) -> Plan:
        """The same where block i was evaluated by rank owners[i], and each rank's blocks in their order."""
        mine: list[list[list[Member]]] = [[] for _ in range(ranks)]
        for block, owner in zip(self.blocks(generation), owners, strict=True):
            mine[owner].append(block)
        return Plan(mine)


@lru_cache(maxsize=1)  # blocks are evaluated, then a plan says who had them: the same thousands of members
def _members(population: Population, generation: int) -> tuple[Member, ...]:
    share = 2 if population.antithetic else 1
    words = philox(population.seed, np.arange(-(-population.size // share)), generation, STREAM_SEEDS)
    seeds = words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)
    return tuple(
        Member(index, int(seeds[index // share]), -1 if population.antithetic and index % 2 else 1)
        for index in range(population.size)
    )


class Plan:
    """Which rank evaluates which blocks in a generation, and the way back to member order.

    Gathered rows come in rank order: those of rank 0's members first. `rows[order]` brings them into
    member order.
    """

    def __init__(self, blocks: list[list[list[Member]]]):
        self.blocks = blocks
        by_rank = [[member for block in mine for member in block] for mine in blocks]
        gathered = [member for members in by_rank for member in members]
        self.counts = [len(members) for members in by_rank]
        self.order = np.argsort([member.index for member in gathered])
        self.members = [gathered[i] for i in self.order]
        self.rank_of = np.repeat(np.arange(len(blocks)), self.counts)[self.order]

    @property
    def seeds(self) -> np.ndarray:
        """uint64 (N,), in member order."""
        return np.array([member.seed for member in self.members], dtype=np.uint64)

    @property
    def signs(self) -> np.ndarray:
        """int8 (N,), in member order."""
        return np.array([member.sign for member in self.members], dtype=np.int8)
