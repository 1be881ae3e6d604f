"""Which prompts members answer, and which steps are tried on."""

from __future__ import annotations

import pytest

from mpies.probe.prompts import Prompts
from mpies.tasks import epochs
from mpies.tasks.base import Task


def task(rows: int) -> Task:
    return Task("custom", [{"prompt": f"prompt {i}"} for i in range(rows)], [], lambda **columns: [])


@pytest.mark.parametrize(("rows", "members", "others"), [(100, 8, 16), (24, 8, 16), (20, 8, 12), (16, 8, 8)])
def test_steps_are_tried_on_prompts_that_no_member_has(rows, members, others):
    made = task(rows)
    drawn = Prompts.draw(made, 7, members)
    mine, theirs = ([row["prompt"] for row in part] for part in (drawn.members, drawn.others))
    assert (len(mine), len(theirs)) == (members, others) and len({*mine, *theirs}) == members + others
    first = [made.train[i]["prompt"] for i in epochs.sample(7, 0, rows, members)]
    assert mine == first, "as a run's first generation draws them"
    assert [start.row["prompt"] for start in drawn.starts_of_steps(made)] == theirs


@pytest.mark.parametrize("rows", [2, 8, 15])
def test_where_too_few_are_left_steps_have_the_members(rows):
    made = task(rows)
    drawn = Prompts.draw(made, 7, 8)
    assert len(drawn.members) == min(rows, 8) and drawn.others == []
    assert drawn.starts_of_steps(made) == drawn.starts_of_members(made)
