"""Which training prompts the members answer, and which the steps are tried on."""

from __future__ import annotations

from dataclasses import dataclass

from mpies.tasks import epochs
from mpies.tasks.base import Row, Task
from mpies.tasks.episodes import Start

# Prompts that steps are tried on, for each that members answer: what a step gains is told by few answers.
OTHERS = 2


@dataclass(frozen=True)
class Prompts:
    """Drawn as a run's first generation draws them."""

    members: list[Row]
    others: list[Row]
    """That no member answers; empty where fewer are left than members have."""

    @classmethod
    def draw(cls, task: Task, seed: int, prompts: int) -> Prompts:
        """So many for the members, and OTHERS times as many others; or as many as there are."""
        total = len(task.train)
        drawn = epochs.sample(seed, 0, total, min(total, (1 + OTHERS) * prompts))
        rows = [task.train[i] for i in drawn]
        others = rows[prompts:]
        return cls(rows[:prompts], others if len(others) >= prompts else [])

    def starts_of_members(self, task: Task) -> list[Start]:
        return task.evaluated_starts(self.members, range(len(self.members)))

    def starts_of_steps(self, task: Task) -> list[Start]:
        """With the others, or with the same where there are none."""
        rows, first = self.others or self.members, len(self.members) if self.others else 0
        return task.evaluated_starts(rows, range(first, first + len(rows)))
