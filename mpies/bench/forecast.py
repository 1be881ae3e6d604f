"""What a generation costs on more ranks than there are here: evaluating, waiting, exchanging, updating.

A model, from constants that were measured here. Its waiting is that of ranks whose blocks are handed out by
the program's own rule; its messages are those that the program sends, in trees of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpies.ranks.collectives import LONGEST_SLEEP, depth
from mpies.ranks.pace import Paces, Round

RANKS = (8, 64, 512, 4096)
BLOCKS = 4  # that each rank should have, where there are so many members
SPREAD = 0.25  # of blocks' seconds: their standard deviation over their mean, as answers differ in length
GENERATIONS = 3  # that waiting is a mean of

# In a generation: barrier, owners of blocks, pairs, digests; then times and costs for rank 0's run file.
COLLECTIVES = 6


@dataclass(frozen=True)
class Constants:
    """Seconds: of a block of one member, of one of `members`; of the update, a member."""

    one: float
    many: float
    members: int
    update: float

    def block(self, members: int) -> float:
        """Seconds of a block of so many members: between the two that were measured."""
        share = (members - 1) / (self.members - 1) if self.members > 1 else 0.0
        return self.one + share * (self.many - self.one)


@dataclass(frozen=True)
class Cost:
    """Seconds of a generation on `ranks` ranks, with blocks of `block` members."""

    ranks: int
    block: int
    static: float
    """In all, by a plan made beforehand."""
    dynamic: float
    """In all, by handing out."""
    waiting_static: float
    """The share of it that ranks wait, on average."""
    waiting_dynamic: float
    exchange: float
    update: float


def messages(ranks: int, blocks: int) -> float:
    """The most that a rank sends in a generation, on average: for steps of trees, and requests for blocks."""
    asked = blocks / ranks if blocks > ranks > 1 else 0.0
    return COLLECTIVES * 2 * depth(ranks) + asked


def evaluate(
    lengths: np.ndarray, speeds: np.ndarray, dynamic: bool, paces: Paces | None = None
) -> tuple[float, float]:
    """Seconds until all ranks have evaluated their blocks, and the share of it that they wait, on average.

    `lengths`: seconds of each block; `speeds`: how many times longer than that each rank takes.
    """
    ranks, blocks = len(speeds), len(lengths)
    if not dynamic or blocks <= ranks:
        ends = np.array([lengths[rank::ranks].sum() * speed for rank, speed in enumerate(speeds)])
    else:
        ends, paces, handed = np.zeros(ranks), paces or Paces(), Round(ranks, 0.0)
        free = [(lengths[rank] * speeds[rank], rank) for rank in range(ranks)]
        heapq.heapify(free)
        while free:
            now, rank = heapq.heappop(free)
            number = handed.give(rank, blocks, now, paces)
            if number is None:
                ends[rank] = now
            else:
                heapq.heappush(free, (now + lengths[number] * speeds[rank], rank))
    longest = float(ends.max())
    return longest, float((longest - ends).mean()) / longest


def forecast(measured: Constants, population: int, ranks: int, spread: float = SPREAD) -> Cost:
    """A generation of `population` members."""
    block = max(1, min(measured.members, population // (BLOCKS * ranks)))
    blocks = -(-population // block)
    draw, paces = np.random.default_rng(1), Paces()
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(GENERATIONS):
        lengths = measured.block(block) * draw.normal(1, spread, blocks).clip(0.1)
        for dynamic, found in times.items():
            found.append(evaluate(lengths, np.ones(ranks), dynamic, paces))
    (dynamic_s, dynamic_w), (static_s, static_w) = (np.mean(found, axis=0) for found in times.values())
    update = measured.update * population
    # At every step of a tree, a rank hands on at its next look.
    exchange = COLLECTIVES * 2 * depth(ranks) * LONGEST_SLEEP / 2
    rest = update + exchange
    return Cost(
        ranks=ranks,
        block=block,
        static=static_s + rest,
        dynamic=dynamic_s + rest,
        waiting_static=static_w * static_s / (static_s + rest),
        waiting_dynamic=dynamic_w * dynamic_s / (dynamic_s + rest),
        exchange=exchange,
        update=update,
    )


def table(ways: dict[str, Constants], population: int) -> Iterator[tuple[str, float, str]]:
    """(what, value, unit) for each way and number of ranks."""
    for way, measured in ways.items():
        for ranks in RANKS:
            cost = forecast(measured, population, ranks)
            where = f"{way}, {ranks} ranks, blocks of {cost.block}"
            yield f"{where}: a generation", cost.dynamic, "s"
            yield f"{where}: a generation, static", cost.static, "s"
            yield f"{where}: waiting", 100 * cost.waiting_dynamic, "%"
            yield f"{where}: waiting, static", 100 * cost.waiting_static, "%"
            yield f"{where}: update", 100 * cost.update / cost.dynamic, "%"
            sent = messages(ranks, -(-population // cost.block))
            yield f"{where}: exchange, {sent:.0f} messages", cost.exchange, "s"
