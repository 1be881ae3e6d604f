"""A block of members, evaluated: perturb, generate, score."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpies.es.population import Member
from mpies.phases import Phases
from mpies.run.exchange import Evaluated
from mpies.tasks.base import Row, TrainerState, member_reward

if TYPE_CHECKING:
    from mpies.replica import Replica


def evaluate_block(
    replica: Replica, rows: list[Row], block: list[Member], sigma: float, state: TrainerState, phases: Phases
) -> list[Evaluated]:
    """The members' rewards and costs, in the block's order; they share its seconds."""
    start = time.perf_counter()
    with phases("perturb"):  # the model computes with base + sigma * sign * noise(seed)
        replica.perturbation.set(block, sigma)
    with phases("generate"):
        answers = replica.engine.generate_block([row["prompt"] for row in rows], len(block))
    with phases("reward"):
        scores = [replica.task.score(rows, answer.texts, answer.ids, state) for answer in answers]
    seconds = (time.perf_counter() - start) / len(block)
    return [
        Evaluated(member, member_reward(score), sum(answer.tokens), seconds)
        for member, score, answer in zip(block, scores, answers, strict=True)
    ]
