"""Steps, tried: how far what a rung's members agree on can be followed.

Members tell how steep the reward is where the model stands. How far the slope holds, only a step tells. So
the update that a rung's members make (paper, section 3) is added to the unperturbed weights in several
lengths, and what these weights answer to prompts that no member was given is compared with the unperturbed
model's. There are many steps, and answers cost: so all are tried on few prompts, and the better half again on
more, round by round (successive halving: Karnin, Koren and Somekh 2013, "Almost optimal exploration in
multi-armed bandits").

A step's length is told by its noise: the independent perturbations of M members, added up, move each weight
at random by alpha / sqrt(M), for fitness values with a standard deviation of 1; those of antithetic pairs by
about as much, at most sqrt(2) times. Length 1 is where that is sigma, as in one perturbation. T updates of N
members leave alpha sqrt(T / N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpies.config import EsSettings, Settings
from mpies.es import fitness
from mpies.es.directions import directions
from mpies.es.population import Plan
from mpies.probe.rung import Base, Rung, Stride
from mpies.ranks.collectives import allgather_objects, broadcast_object
from mpies.replica import Replica
from mpies.tasks.base import TrainerState
from mpies.tasks.episodes import Start

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

LENGTHS = (1 / 4, 1 / 2, 1, 2, 4)

# The number of a rung, and a length.
Piece = tuple[int, float]

# A step that moves nothing, whosever: the unperturbed model.
GROUND: Piece = (0, 0.0)

# How often in a round it is told how far it is.
TOLD = 4

# Standard deviation of a generation's fitness values, which steps are in proportion to: of ranks, that of
# many members where no two are equal.
FITNESS_SPREAD = {"zscore": 1.0, "centered_rank": 1 / math.sqrt(12)}


def alpha_of(length: float, sigma: float, members: int, updates: float, by: str) -> float:
    """That of so many updates of so many members each whose noise, all together, has that length; `by`:
    es.fitness."""
    return length * sigma * math.sqrt(members / updates) / FITNESS_SPREAD[by]


def try_steps(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    rungs: Sequence[Rung],
    plan: Plan,
    rounds: list[list[Start]],
    say: Callable[[str], None],
) -> list[list[Stride]]:
    """For every rung its steps of all LENGTHS, the same on every rank. Collective.

    `plan`: of the rungs' members. `rounds`: of the episodes that steps are tried in, and the unperturbed
    model, too. The base is as it was; live weights are some step's.
    """
    pieces = [(rung, length) for length in LENGTHS[::-1] for rung in range(len(rungs))]  # the longest first
    steps: dict[Piece, Stride] = {}
    for number, starts in enumerate(rounds):
        if number:  # as rank 0 has it, should another kind of processor round otherwise
            pieces = broadcast_object(comm, better_half(steps, pieces))
        say(
            f"trying {len(pieces)} steps on {len(starts)} {'more ' if number else ''}prompts,"
            f" {(len(pieces) + 1) * len(starts)} answers"
        )
        after = _answer(comm, settings, replica, rungs, plan, [*pieces, GROUND], starts, say)
        for piece in pieces:
            at, length = piece
            step = Stride(length, _alpha(rungs[at], length, settings.es), after[GROUND], after[piece])
            steps[piece] = steps[piece].joined(step) if piece in steps else step
    return [[steps[at, length] for length in LENGTHS] for at in range(len(rungs))]


def better_half(steps: dict[Piece, Stride], pieces: list[Piece]) -> list[Piece]:
    """Of these pieces, in their order: those that gained more, before all the ones that cannot be taken."""
    gains = {piece: steps[piece].gain.mean if steps[piece].bearable else -math.inf for piece in pieces}
    ranked = sorted(pieces, key=gains.__getitem__, reverse=True)
    kept = set(ranked[: -(-len(ranked) // 2)])
    return [piece for piece in pieces if piece in kept]


def _answer(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    rungs: Sequence[Rung],
    plan: Plan,
    pieces: list[Piece],
    starts: list[Start],
    say: Callable[[str], None],
) -> dict[Piece, Base]:
    """What the weights after each of these steps answer. Ranks take turns. Collective."""
    state = TrainerState(0, settings.es.generations)
    mine: dict[Piece, Base] = {}
    turns = pieces[comm.rank :: comm.size]
    for done, (at, length) in enumerate(turns, 1):
        _show(replica, plan, _coefficients(rungs[at], length, settings.es))
        (played,) = replica.task.play(replica.engine, starts, state=state)
        mine[at, length] = Base.of(played)
        if done * TOLD // len(turns) > (done - 1) * TOLD // len(turns):
            say(f"step {done} of {len(turns)} that are rank 0's")
    return {piece: base for part in allgather_objects(comm, mine) for piece, base in part.items()}


def _alpha(rung: Rung, length: float, es: EsSettings) -> float:
    return alpha_of(length, rung.sigma, len(rung.rewards), 1, es.fitness)


def _coefficients(rung: Rung, length: float, es: EsSettings) -> np.ndarray:
    """Of the members, float32 (members,), as a generation of them would have."""
    return fitness.coefficients(rung.of_members, _alpha(rung, length, es), es.fitness)


def _show(replica: Replica, plan: Plan, coefficients: np.ndarray) -> None:
    """Live weights <- what an update with these coefficients would make of the base, which stays."""
    replica.weights.show_updated(*directions(plan.seeds, plan.signs, coefficients))
    replica.perturbation.rest()
