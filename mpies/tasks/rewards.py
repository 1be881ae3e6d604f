"""The user's reward functions: found, loaded, weighted.

Their signature is that of TRL's GRPOTrainer; so is what becomes of several: the weighted sum of those
that do not return None for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpies import config
from mpies.tasks import users_code
from mpies.tasks.base import Reward, check_rewards


@dataclass(frozen=True)
class Weighted:
    """Several reward functions as one, which logs each one's rewards under its name."""

    functions: dict[str, Reward]
    weights: dict[str, float]

    def __call__(self, **columns: Any) -> list[float]:
        answers = len(columns["completions"])
        made = {
            name: check_rewards(users_code.call(function, **columns), answers, name)
            for name, function in self.functions.items()
        }
        if len(made) > 1:
            for name, logged in _logged_as(made).items():
                columns["log_extra"](logged, made[name])
        terms = np.array([self.weights[name] * rewards for name, rewards in made.items()])
        return [_sum([term for term in answer if not math.isnan(term)]) for answer in terms.T.tolist()]


def load(weights: dict[str, float]) -> Weighted:
    """The functions that `task.reward` names, as FILE.py:FUNCTION or MODULE:FUNCTION. Raises InputError."""
    return Weighted({name: _function(name) for name in weights}, weights)


def parts_of(weights: dict[str, float]) -> frozenset[str]:
    """The names of several functions' rewards among an answer's metrics; none of a single function."""
    return frozenset(_logged_as(weights).values()) if len(weights) > 1 else frozenset()


def _logged_as(names: Collection[str]) -> dict[str, str]:
    """Functions are logged by their names alone; those of one name, with their files'."""
    functions = [name.rpartition(":")[2] for name in names]
    return {
        name: function if functions.count(function) == 1 else config.short_name(name)
        for name, function in zip(names, functions, strict=True)
    }


def _sum(terms: list[float]) -> float:
    return math.fsum(terms) if terms else math.nan


def _function(name: str) -> Callable[..., Any]:
    function = users_code.load(name, "task.reward")
    users_code.refuse_signature(function, "task.reward", name, "as in TRL")
    return function
