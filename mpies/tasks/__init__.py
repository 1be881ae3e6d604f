"""Tasks: prompts and rewards."""

from __future__ import annotations

import dataclasses

from mpies import config
from mpies.errors import InputError
from mpies.tasks import rewards
from mpies.tasks.base import Task


def make(settings: config.TaskSettings, seed: int = 0) -> Task:
    """The task that the settings describe; `seed` (es.seed) orders its prompts.

    Raises InputError for bad data and for reward functions that cannot be loaded.
    """
    own = rewards.load(settings.reward) if settings.reward else None
    task = _make(settings, own)
    size = settings.prompts_per_generation
    if size > len(task.train):
        raise InputError(
            f"task.prompts_per_generation: given {size}, but there are {len(task.train)} training prompts"
        )
    # As many as there are: all of them, in their own order.
    size = size if size < len(task.train) else 0
    return dataclasses.replace(task, reward=own or task.reward, prompts_per_generation=size, seed=seed)


def refuse_messages_without_template(task: Task, tokenizer) -> None:
    """Raise InputError for prompts that are chat messages if the model has no way to write them."""
    messages = any(not isinstance(row["prompt"], str) for row in task.train + task.held_out)
    if messages and not tokenizer.chat_template:
        raise InputError(
            "task.train_data: its prompts are chat messages, but this model's tokenizer has no chat"
            " template; use prompts that are text, or a model that was trained for chats"
        )


def _make(settings: config.TaskSettings, own: rewards.Weighted | None) -> Task:
    if settings.name == "countdown":
        from mpies.tasks import countdown

        return countdown.make_task(settings)
    if settings.name == "math":
        from mpies.tasks import math

        return math.make_task(settings)
    if settings.name == "custom":
        from mpies.tasks import custom

        assert own, "settings without a reward are refused"
        return custom.make_task(settings, own)
    from mpies.tasks import conciseness

    return conciseness.make_task(settings)
