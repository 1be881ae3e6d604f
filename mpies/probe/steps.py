"""Steps, tried: how far what a rung's members agree on can be followed.

Members tell how steep the reward is where the model stands. How far the slope holds, only a step tells. So
the update that a rung's members make (paper, section 3) is added to the unperturbed weights in several
lengths, and what these weights answer to prompts that no member was given is compared with the unperturbed
model's.

A step's length is told by its noise: the independent perturbations of M members, added up, move each weight
at random by alpha / sqrt(M), for fitness values with a standard deviation of 1. Length 1 is where that is
sigma, as in one perturbation. T updates of N members leave alpha sqrt(T / N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpies.config import EsSettings, Settings
from mpies.es import fitness
from mpies.es.directions import directions
from mpies.es.population import Member
from mpies.es.symptoms import ACCURACY
from mpies.probe.rung import Base, Rung, Step
from mpies.ranks.collectives import allgather_objects
from mpies.replica import Replica
from mpies.tasks.base import TrainerState, member_reward
from mpies.tasks.episodes import Start

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

LENGTHS = (1 / 4, 1 / 2, 1, 2, 4)

# A step that moves nothing, whosever: the unperturbed model.
GROUND = (0, 0.0)

# How often it is told how far it is.
TOLD = 7

# Standard deviation of a generation's fitness values, which steps are in proportion to.
FITNESS_SPREAD = {"zscore": 1.0, "centered_rank": 1 / math.sqrt(12)}


def alpha_of(length: float, sigma: float, members: int, updates: int, fitness: str) -> float:
    """The alpha of so many updates of so many members each whose noise has that length."""
    return length * sigma * math.sqrt(members / updates) / FITNESS_SPREAD[fitness]


def try_steps(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    rungs: Sequence[Rung],
    members: list[Member],
    starts: list[Start],
    say: Callable[[str], None],
) -> list[list[Step]]:
    """For every rung its steps of all LENGTHS, the same on every rank. Collective.

    `members`: the rungs'. `starts`: of the episodes that all steps are tried in, and the unperturbed model,
    too. Each step is a piece of work, and ranks take turns. The base is as it was; live weights are the last
    step's.
    """
    work: list[tuple[int, float]] = [(rung, length) for length in LENGTHS[::-1] for rung in range(len(rungs))]
    work.append(GROUND)  # the longest first: they may give the longest answers
    say(f"trying {len(work) - 1} steps on {len(starts)} prompts, {len(work) * len(starts)} answers")
    state = TrainerState(0, settings.es.generations)
    mine: dict[tuple[int, float], Base] = {}
    pieces = work[comm.rank :: comm.size]
    for done, (at, length) in enumerate(pieces, 1):
        _show(replica, members, _coefficients(rungs[at], length, settings.es))
        mine[at, length] = _answered(replica, starts, state)
        if done * TOLD // len(pieces) > (done - 1) * TOLD // len(pieces):
            say(f"step {done} of {len(pieces)} that are rank 0's")
    found = {piece: after for part in allgather_objects(comm, mine) for piece, after in part.items()}
    return [
        [
            Step(length, _alpha(rung, length, settings.es), found[GROUND], found[at, length])
            for length in LENGTHS
        ]
        for at, rung in enumerate(rungs)
    ]


def _alpha(rung: Rung, length: float, es: EsSettings) -> float:
    return alpha_of(length, rung.sigma, len(rung.rewards), 1, es.fitness)


def _coefficients(rung: Rung, length: float, es: EsSettings) -> np.ndarray:
    """Of the members, float32 (members,), as a generation of them would have."""
    rewards = np.array([member_reward(own) for own in rung.rewards])
    return fitness.coefficients(rewards, _alpha(rung, length, es), es.fitness)


def _show(replica: Replica, members: list[Member], coefficients: np.ndarray) -> None:
    """Live weights <- cast(base + sum of coefficient * sign * noise(seed)); the base stays."""
    seeds = np.array([member.seed for member in members], np.uint64)
    signs = np.array([member.sign for member in members], np.int8)
    terms = directions(seeds, signs, coefficients)
    weights = replica.weights
    replica.perturbation.clear()
    weights.show((name, weights.updated(name, *terms)) for name in weights.base)


def _answered(replica: Replica, starts: list[Start], state: TrainerState) -> Base:
    (played,) = replica.task.play(replica.engine, starts, state=state)
    made, scores = played.episodes, played.scores
    return Base(
        scores.rewards,
        scores.metrics.get(ACCURACY, np.full(len(made), np.nan)),
        np.array([one.tokens for one in made]),
        sum(one.truncated for one in made) / len(made),
    )
