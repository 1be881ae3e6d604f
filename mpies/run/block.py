"""A block of members, evaluated: perturb, generate, score."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from mpies.engines.base import Completions
from mpies.es.answers import Answers, mark
from mpies.es.population import Member
from mpies.measure.statistics import mean
from mpies.phases import Phases
from mpies.run.exchange import Evaluated
from mpies.tasks.base import Row, Scores, TrainerState, member_reward

if TYPE_CHECKING:
    from mpies.replica import Replica


def evaluate_block(
    replica: Replica, rows: list[Row], block: list[Member], sigma: float, state: TrainerState, phases: Phases
) -> list[Evaluated]:
    """The members' rewards and costs, in the block's order; they share its seconds."""
    start = time.perf_counter()
    judged = judge_block(replica, rows, block, sigma, state, phases)
    seconds = (time.perf_counter() - start) / len(block)
    return [
        Evaluated(member, member_reward(score.rewards), sum(answer.tokens), seconds, _noted(answer, score))
        for member, (answer, score) in zip(block, judged, strict=True)
    ]


def judge_block(
    replica: Replica, rows: list[Row], block: list[Member], sigma: float, state: TrainerState, phases: Phases
) -> list[tuple[Completions, Scores]]:
    """What each member answers to the rows, and what that is worth, in the block's order."""
    with phases("perturb"):  # the model computes with base + sigma * sign * noise(seed)
        replica.perturbation.set(block, sigma)
    with phases("generate"):
        answers = replica.engine.generate_block([row["prompt"] for row in rows], len(block))
    with phases("reward"):
        scores = [replica.task.judge(rows, answer.texts, answer.ids, state) for answer in answers]
    return list(zip(answers, scores, strict=True))


def _noted(made: Completions, scores: Scores) -> Answers:
    """What of a member's answers goes to rank 0."""
    return Answers(
        marks=np.array([mark(text) for text in made.texts], dtype=np.uint64),
        rewards=scores.rewards,
        truncated=sum(made.truncated),
        metrics={name: mean(values) for name, values in scores.metrics.items()},
    )
