"""Says, once each, when a run does not learn for a reason that its numbers show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpies.es import symptoms
from mpies.es.symptoms import PATIENCE, Course

if TYPE_CHECKING:
    from mpies.run.telemetry import Diagnosis


MOSTLY = 0.9  # of a generation's episodes


class Advisor:
    """Looks at every generation of this job; `say` is given a line where something is wrong.

    `parts`: names of the figures that the reward is made of, where it has several; `of_probabilities`: is it
    made of those (task.expects)?
    """

    def __init__(
        self,
        say: Callable[[str], None],
        parts: frozenset[str] = frozenset(),
        of_probabilities: bool = False,
    ):
        self.unperturbed: float | None = None
        """The unperturbed model's mean reward on training prompts, when it was last evaluated."""
        self.error: float = np.nan
        """That mean's standard error over its prompts, if a generation has others than the evaluation; else
        0."""
        self._say = say
        self._parts = parts
        self._of_probabilities = of_probabilities
        self._said: set[str] = set()
        self._below = 0
        self._rewards: list[tuple[float, float]] = []
        self._course: list[tuple[float, float, dict[str, float]]] = []

    def look(
        self,
        generation: int,
        rewards: np.ndarray,
        coefficients: np.ndarray,
        findings: Diagnosis | None = None,
    ) -> None:
        """rewards float64 (N,), NaN where not scored; coefficients (N,) of the update; what answers tell."""
        scored = rewards[~np.isnan(rewards)]
        self._look_at_spread(generation, scored, coefficients)
        self._look_below(generation, scored)
        if findings:
            self._look_at_answers(generation, findings)

    def _look_at_spread(self, generation: int, scored: np.ndarray, coefficients: np.ndarray) -> None:
        if len(scored) > 1 and not coefficients.any():
            self._once(
                "spread",
                f"generation {generation + 1}: all members have the reward {scored[0]:.4g}, so that nothing"
                " can be learned from it. A larger es.sigma makes members answer differently; more prompts,"
                " or a reward with more steps in between, tell them apart",
            )

    def _look_below(self, generation: int, scored: np.ndarray) -> None:
        if self.unperturbed is None:
            return
        self._rewards.append((float(scored.mean()), float(scored.std())))
        means, deviations = np.array(self._rewards[-PATIENCE:]).T
        self._below = self._below + 1 if scored.max() < self.unperturbed else 0
        if self._below == PATIENCE:
            who = f"even the best member ({scored.max():.4g} now) is worse"
        elif symptoms.is_far_below(means, deviations, self.unperturbed, self.error):
            who = f"the members' mean ({means[-1]:.4g} +- {deviations[-1]:.2g} now) is far worse"
        else:
            return
        self._once(
            "below",
            f"generation {generation + 1}: for {PATIENCE} generations, {who} than the unperturbed model"
            f" ({self.unperturbed:.4g}). The perturbations damage the model more than they tell: set a"
            " smaller es.sigma",
        )

    def _look_at_answers(self, generation: int, findings: Diagnosis) -> None:
        latest = findings.agreement.identical_pairs, findings.truncated, findings.cosines
        self._course.append(latest)
        identical, truncated, cosines = zip(*self._course, strict=True)
        names = sorted({name for one in cosines for name in one})
        course = Course(
            np.array(identical),
            np.array(truncated),
            {name: np.array([one.get(name, np.nan) for one in cosines]) for name in names},
            self._parts,
            self._of_probabilities,
        )
        for name, rule in symptoms.RULES.items():
            if name not in self._said and (text := rule(course)):
                self._once(name, f"generation {generation + 1}: {text}")

    def hear(self, generation: int, complaints: list[str], cut: float) -> None:
        """What environments of this generation have failed with; the share of episodes that a limit ended."""
        if cut > MOSTLY:
            self._once(
                "cut",
                f"generation {generation + 1}: a limit has ended {cut:.0%} of the episodes, whose rewards are"
                " what they had by then: if they are to come to an end of their own, set a larger"
                " task.max_turns or task.episode_tokens, or a smaller engine.max_new_tokens",
            )
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
