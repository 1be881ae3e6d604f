"""Says, once each, when a run does not learn for a reason that its numbers show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Generations in a row in which even the best member is worse than the unperturbed model.
PATIENCE = 3


class Advisor:
    """Looks at every generation's rewards; `say` is given a line where something is wrong."""

    def __init__(self, say: Callable[[str], None]):
        self.unperturbed: float | None = None
        """The unperturbed model's mean reward on training prompts, when it was last evaluated."""
        self._say = say
        self._said: set[str] = set()
        self._below = 0

    def look(self, generation: int, rewards: np.ndarray, coefficients: np.ndarray) -> None:
        """rewards float64 (N,), NaN where not scored; coefficients (N,) of the update."""
        scored = rewards[~np.isnan(rewards)]
        if len(scored) > 1 and not coefficients.any():
            self._once(
                "spread",
                f"generation {generation + 1}: all members have the reward {scored[0]:.4g}, so that nothing"
                " can be learned from it. A larger es.sigma makes members answer differently; more prompts,"
                " or a reward with more steps in between, tell them apart",
            )
        worse = self.unperturbed is not None and scored.max() < self.unperturbed
        self._below = self._below + 1 if worse else 0
        if self._below == PATIENCE:
            self._once(
                "below",
                f"generation {generation + 1}: for {PATIENCE} generations, even the best member"
                f" ({scored.max():.4g} now) is worse than the unperturbed model ({self.unperturbed:.4g}). The"
                " perturbations damage the model more than they tell: set a smaller es.sigma",
            )

    def hear(self, generation: int, complaints: list[str]) -> None:
        """What environments of this generation have failed with."""
        for complaint in complaints[:1]:
            self._once(
                "environments",
                f"generation {generation + 1}: an episode's environment failed ({complaint}); it gets"
                " task.failure_reward, and is counted in /member/failed of the run file",
            )

    def _once(self, condition: str, text: str) -> None:
        if condition not in self._said:
            self._said.add(condition)
            self._say(f"warning: {text}")
