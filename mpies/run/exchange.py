"""What ranks tell one another in a generation: (seed, reward) pairs; then digests and whether to stop.

16 bytes a member and 16 bytes a rank travel, and nothing else (paper, section 3): what `telemetry` gathers on
rank 0 for the run file comes afterwards, and no weight depends on it.
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
from mpies.ranks.collectives import allgather_rows, barrier, named
from mpies.tasks.episodes import Tally
from mpies.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.phases import Phases

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])
WORDS = np.dtype([("digest", "<u8"), ("stop", "<i8")])


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


def exchange_rewards(comm: Comm, phases: Phases, plan: Plan, mine: list[Evaluated]) -> np.ndarray:
    """All members' rewards, float64 (N,), in member order. Collective.

    Raises OutOfTimeError on all ranks if any had to leave members unevaluated, DivergedError if a rank
    evaluated others than the plan's, and RefusedError if no member could be scored.
    """
    pairs = np.array([(one.member.seed, one.reward) for one in mine], dtype=PAIR)
    with phases("wait"):
        unfinished = barrier(comm, word=len(pairs) < plan.counts[comm.rank])
    if unfinished:
        raise OutOfTimeError
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
        raise RefusedError("no answer of this generation could be scored; see the reward function")
    return rewards


def compare_replicas(
    comm: Comm, phases: Phases, digest: int, wants_to_stop: Callable[[], bool], generation: int
) -> bool:
    """Compare the replicas' digests; does any rank want to stop after this generation? Collective.

    Raises DivergedError on all ranks if a rank's base differs from the others'.
    """
    with phases("wait"):
        barrier(comm)
    with phases("communicate"):
        words = np.array([(digest, wants_to_stop())], dtype=WORDS)
        words = allgather_rows(comm, words, [1] * comm.size)
    differing = find_diverged(words["digest"].tolist())
    if differing:
        raise DivergedError(
            f"generation {generation + 1}: the base weights of {named(comm, differing)} differ from the"
            " others'; this generation is not committed. Memory errors or mixed software do this"
        )
    return bool(words["stop"].any())


def bytes_received(comm: Comm, members: int) -> int:
    """What a rank receives in a generation."""
    return members * PAIR.itemsize + comm.size * WORDS.itemsize
