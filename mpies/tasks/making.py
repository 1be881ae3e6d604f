"""The task that the settings describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mpies import config
from mpies.errors import InputError
from mpies.tasks import expected, rewards
from mpies.tasks.base import Task

Load = Callable[[dict[str, float]], rewards.Weighted]


def make(
    settings: config.TaskSettings,
    seed: int = 0,
    load: Load = rewards.load,
    load_expects: Callable[[str], expected.Expects] = expected.load,
) -> Task:
    """The task that the settings describe; `seed` (es.seed) orders its prompts.

    `load` and `load_expects` import the user's functions. Raises InputError for bad data and for functions
    that cannot be loaded.
    """
    own = load(settings.reward) if settings.reward else None
    task = _make(settings, own, seed)
    size = settings.prompts_per_generation
    if size > len(task.train):
        raise InputError(
            f"task.prompts_per_generation: given {size}, but there are {len(task.train)} training prompts"
        )
    # As many as there are: all of them, in their own order.
    size = size if size < len(task.train) else 0
    expects = load_expects(settings.expects) if settings.expects else None
    if expects and any(expected.COLUMN in row for row in [*task.train, *task.held_out]):
        raise InputError(
            f"task.train_data: the column {expected.COLUMN!r} has a name that task.expects uses for something"
            " else; rename it"
        )
    return dataclasses.replace(
        task, reward=own or task.reward, prompts_per_generation=size, seed=seed, expects=expects
    )


def _make(settings: config.TaskSettings, own: rewards.Weighted | None, seed: int) -> Task:
    if settings.in_environments:
        from mpies.tasks.environments import task

        return task.make_task(settings, own, seed)
    if settings.name == "countdown":
        from mpies.tasks import countdown

        return countdown.make_task(settings)
    if settings.name == "math":
        from mpies.tasks import math

        return math.make_task(settings)
    if settings.name == "questions":
        from mpies.tasks import questions

        return questions.make_task(settings)
    if settings.name == "custom":
        from mpies.tasks import custom

        assert own, "settings without a reward are refused"
        return custom.make_task(settings, own)
    from mpies.tasks import conciseness

    return conciseness.make_task(settings)
