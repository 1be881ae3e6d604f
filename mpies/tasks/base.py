"""A task: rows with prompts for training and for evaluation, and a reward function.

A row is a dictionary with `prompt` and any other columns. The reward function has the signature that
TRL's GRPOTrainer expects, reward(prompts, completions, **columns) -> list[float | None].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Task:
    """`train` rows give the members' rewards; `held_out` rows are evaluated only."""

    name: str
    train: list[Row]
    held_out: list[Row]
    reward: Reward

    def score(self, rows: list[Row], completions: list[str]) -> np.ndarray:
        """A reward per row: float64, shape (rows,); NaN where an answer could not be scored."""
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        rewards = self.reward([row["prompt"] for row in rows], completions, **columns)
        if len(rewards) != len(rows):
            raise ValueError(
                f"the reward function of task {self.name} returned {len(rewards)} rewards"
                f" for {len(rows)} completions"
            )
        values = [math.nan if r is None else float(r) for r in rewards]
        return np.array([r if math.isfinite(r) else math.nan for r in values])


def member_reward(rewards: np.ndarray) -> float:
    """A member's reward: the mean over its answers, exactly rounded; NaN if any was not scored."""
    return math.fsum(rewards.tolist()) / len(rewards)
