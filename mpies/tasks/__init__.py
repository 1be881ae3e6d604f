"""Tasks: prompts and rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from mpies import config
from mpies.engines.base import Encoder, Prompt
from mpies.engines.image import images_in
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


def refuse_messages_without_template(task: Task, tokenizer) -> None:
    """Raise InputError for prompts that are chat messages if the model has no way to write them."""
    messages = any(not isinstance(prompt, str) for prompt in task.prompts)
    if messages and not tokenizer.chat_template:
        raise InputError(
            "task.train_data: its prompts are chat messages, but this model's tokenizer has no chat"
            " template; use prompts that are text, or a model that was trained for chats"
        )


def refuse_prompts_of_wrong_length(task: Task, text: Encoder, new: int) -> None:
    """Raise InputError for a prompt without tokens, or without room for an answer of `new` tokens.

    A model computes on beyond what it was trained on, and its answers are nonsense; or it fails then. An
    episode that has no room for an answer would end before its first turn.
    """
    episode = task.most_tokens(text)
    most, limit = text.positions, f"the model knows {text.positions} positions"
    if episode and (most is None or episode < most):
        most, limit = episode, f"an episode has room for {episode} (task.episode_tokens)"
    for setting, name, number, prompt in _numbered_prompts(task):
        try:
            tokens = len(text.encode(prompt))
        except InputError as error:
            if not images_in(prompt):
                raise
            raise InputError(f"{setting}: {name} prompt {number}: {error}") from None
        if not tokens:
            raise InputError(f"{setting}: {name} prompt {number} has no tokens; leave the row out")
        if most and tokens + new > most:
            room = (
                f"use an engine.max_new_tokens of {most - tokens} or less, or leave the row out"
                if tokens < most
                else "leave the row out"
            )
            raise InputError(
                f"{setting}: {name} prompt {number} has {tokens} tokens and its answer up to {new},"
                f" but {limit}; {room}"
            )


def _numbered_prompts(task: Task) -> Iterator[tuple[str, str, int, Prompt]]:
    """Each prompt with its setting, its split and its number."""
    if task.environments:
        for number, prompt in enumerate(task.environments.openings, 1):
            yield task.environments.setting, "an episode's", number, prompt
        return
    parts = (("task.train_data", "training", task.train), ("task.eval_data", "held-out", task.held_out))
    for setting, name, rows in parts:
        for number, row in enumerate(rows, 1):
            yield setting, name, number, row["prompt"]


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
