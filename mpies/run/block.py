"""A block of members, evaluated: perturb, then let all play the same episodes, and score these."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpies.es.population import Member
from mpies.phases import Phases
from mpies.run.exchange import Evaluated
from mpies.tasks.base import TrainerState, member_reward
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
    with phases("perturb"):  # the model computes with base + sigma * sign * noise(seed)
        replica.perturbation.set(block, sigma)
    task = replica.task
    played = task.play(replica.engine, starts, len(block), state=state, clock=phases)
    seconds = (time.perf_counter() - begun) / len(block)
    tallies = [Tally.of(one.episodes, task.environments is not None) for one in played]
    return [
        Evaluated(member, member_reward(one.scores.rewards), tally.tokens, seconds, tally)
        for member, one, tally in zip(block, played, tallies, strict=True)
    ]
