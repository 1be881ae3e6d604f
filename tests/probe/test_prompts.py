"""Which prompts members answer, and which steps are tried on."""

from __future__ import annotations

import pytest

from mpies.probe.prompts import Prompts
from mpies.tasks import epochs
from mpies.tasks.base import Task


def task(rows: int) -> Task:
    return Task("custom", [{"prompt": f"prompt {i}"} for i in range(rows)], [], lambda **columns: [])


@pytest.mark.parametrize(
    ("rows", "rounds"), [(100, [8, 16, 32]), (64, [8, 16, 32]), (40, [8, 16, 8]), (24, [8, 8]), (16, [8])]
)
def test_steps_are_tried_on_prompts_that_no_member_has(rows, rounds):
    made = task(rows)
    drawn = Prompts.draw(made, 7, 8)
    first = [made.train[i]["prompt"] for i in epochs.sample(7, 0, rows, 8)]
    assert [row["prompt"] for row in drawn.members] == first, "as a run's first generation draws them"
    tried = [[start.row["prompt"] for start in starts] for starts in drawn.rounds_of_steps(made)]
    assert list(map(len, tried)) == rounds
    assert len({*first, *(prompt for prompts in tried for prompt in prompts)}) == 8 + sum(rounds)


@pytest.mark.parametrize("rows", [2, 8, 15])
def test_where_too_few_are_left_steps_have_the_members(rows):
    made = task(rows)
    drawn = Prompts.draw(made, 7, 8)
    assert len(drawn.members) == min(rows, 8) and drawn.others == []
    assert drawn.rounds_of_steps(made) == [drawn.starts_of_members(made)]
