"""Which training prompts the members answer, and which the steps are tried on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mpies.tasks import epochs
from mpies.tasks.base import Row, Task
from mpies.tasks.episodes import Start

# Prompts that a round of steps is tried on, for each that members answer: few steps are left for the last.
ROUNDS = (1, 2, 4)


@dataclass(frozen=True)
class Prompts:
    """Drawn as a run's first generation draws them."""

    members: list[Row]
    others: list[Row]
    """That no member answers; empty where fewer are left than members have."""

    @classmethod
    def draw(cls, task: Task, seed: int, prompts: int) -> Prompts:
        """So many for the members, and others for all rounds; or as many as there are."""
        total = len(task.train)
        drawn = epochs.sample(seed, 0, total, min(total, (1 + sum(ROUNDS)) * prompts))
        rows = [task.train[i] for i in drawn]
        others = rows[prompts:]
        return cls(rows[:prompts], others if len(others) >= prompts else [])

    def starts_of_members(self, task: Task) -> list[Start]:
        return task.evaluated_starts(self.members, range(len(self.members)))

    def rounds_of_steps(self, task: Task) -> list[list[Start]]:
        """With the others, as far as they go; one round with the members' where there are none."""
        if not self.others:
            return [self.starts_of_members(task)]
        first = len(self.members)
        starts = task.evaluated_starts(self.others, range(first, first + len(self.others)))
        cuts = itertools.accumulate((first * prompts for prompts in ROUNDS), initial=0)
        return [starts[a:b] for a, b in itertools.pairwise(cuts) if starts[a:b]]
