"""A block of members, evaluated: perturb, then let all play the same episodes, and score these."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from mpies.es.answers import Answers, mark
from mpies.es.population import Member
from mpies.measure.statistics import mean
from mpies.phases import Phases
from mpies.run.exchange import Evaluated
from mpies.tasks.base import Played, TrainerState, member_reward
from mpies.tasks.episodes import Start, Tally

if TYPE_CHECKING:
    from mpies.replica import Replica


def evaluate_block(
    replica: Replica,
    starts: list[Start],
    block: list[Member],
    sigma: float,
    state: TrainerState,
    phases: Phases,
) -> list[Evaluated]:
    """The members' rewards and costs, in the block's order; they share its seconds."""
    begun = time.perf_counter()
    judged = judge_block(replica, starts, block, sigma, state, phases)
    seconds = (time.perf_counter() - begun) / len(block)
    tallies = [Tally.of(one.episodes, replica.task.environments is not None) for one in judged]
    return [
        Evaluated(member, member_reward(one.scores.rewards), tally.tokens, seconds, _noted(one), tally)
        for member, one, tally in zip(block, judged, tallies, strict=True)
    ]


def judge_block(
    replica: Replica,
    starts: list[Start],
    block: list[Member],
    sigma: float,
    state: TrainerState,
    phases: Phases,
) -> list[Played]:
    """What each member makes of the episodes, and what that is worth, in the block's order."""
    with phases("perturb"):  # the model computes with base + sigma * sign * noise(seed)
        replica.perturbation.set(block, sigma)
    return replica.task.play(replica.engine, starts, len(block), state=state, clock=phases)


def _noted(played: Played) -> Answers:
    """What of a member's answers goes to rank 0."""
    return Answers(
        marks=np.array([mark(one.said) for one in played.episodes], dtype=np.uint64),
        rewards=played.scores.rewards,
        truncated=sum(one.truncated for one in played.episodes),
        metrics={name: mean(values) for name, values in played.scores.metrics.items()},
    )
