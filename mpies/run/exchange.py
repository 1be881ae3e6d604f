"""What ranks tell one another in a generation: (seed, reward) pairs; then digests and whether to stop.

16 bytes a member travel (paper, section 3), and some words up and down a tree of ranks: what `telemetry`
gathers on rank 0 for the run file comes afterwards, and no weight depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mpies.errors import DivergedError, RefusedError
from mpies.es.answers import Answers
from mpies.es.population import Member, Plan
from mpies.ranks.agreement import find_diverged
from mpies.ranks.collectives import allgather_rows, allreduce_max, barrier, depth, named
from mpies.tasks.episodes import Tally
from mpies.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.phases import Phases

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])
WORDS = 32  # bytes: whether a rank has evaluated all its members; digest, its complement, whether to stop


@dataclass(frozen=True)
class Evaluated:
    """A member after its evaluation."""

    member: Member
    reward: float
    tokens: int
    seconds: float
    answers: Answers
    tally: Tally = field(default_factory=Tally)
    """What its episodes came to."""


def end_evaluation(comm: Comm, phases: Phases, complete: bool) -> None:
    """Wait until every rank has evaluated its members. Collective.

    Raises OutOfTimeError on all ranks if any had to leave members unevaluated.
    """
    with phases("wait"):
        unfinished = barrier(comm, word=not complete)
    if unfinished:
        raise OutOfTimeError


def exchange_rewards(comm: Comm, phases: Phases, plan: Plan, mine: list[Evaluated]) -> np.ndarray:
    """All members' rewards, float64 (N,), in member order. Collective.

    Raises DivergedError if a rank evaluated others than the plan's, and RefusedError if no member could be
    scored.
    """
    pairs = np.array([(one.member.seed, one.reward) for one in mine], dtype=PAIR)
    with phases("communicate"):
        pairs = allgather_rows(comm, pairs, plan.counts)[plan.order]
    differing = np.unique(plan.rank_of[pairs["seed"] != plan.seeds]).tolist()
    if differing:
        raise DivergedError(
            f"{named(comm, differing)} evaluated other members than those of the plan; this generation is not"
            " committed. Memory errors or mixed software do this"
        )
    rewards = pairs["reward"].copy()
    if np.isnan(rewards).all():
        raise RefusedError(
            "every member has an answer that could not be scored (None, or not a number), so that none can be"
            " compared; let the reward function return 0 for answers that it has nothing to say about"
        )
    return rewards


def compare_replicas(
    comm: Comm, phases: Phases, digest: int, wants_to_stop: Callable[[], bool], generation: int
) -> bool:
    """Compare the replicas' digests; does any rank want to stop after this generation? Collective.

    Raises DivergedError on all ranks if a rank's base differs from the others'.
    """
    digests = np.array([digest, ~digest & 2**64 - 1], dtype=np.uint64)
    with phases("wait"):
        words = allreduce_max(comm, np.array([*digests, wants_to_stop()], dtype=np.uint64))
    if words[0] != ~words[1]:  # the largest digest, and the smallest
        differing = find_diverged(allgather_rows(comm, digests[:1], [1] * comm.size).tolist())
        which = "and rank 0 differ" if comm.size == 2 else "differ from the others'"
        raise DivergedError(
            f"generation {generation + 1}: the base weights of {named(comm, differing)} {which};"
            " this generation is not committed. Memory errors or mixed software do this"
        )
    return bool(words[2])


def bytes_received(members: int, ranks: int) -> int:
    """What a rank receives in a generation: pairs, and the words of a tree of ranks."""
    return members * PAIR.itemsize + WORDS * depth(ranks)
