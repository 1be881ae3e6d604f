"""Prompts that a model cannot answer as they are: refused before the first one is."""

from __future__ import annotations

from collections.abc import Iterator

from mpies.engines.base import Encoder, Prompt
from mpies.engines.image import images_in
from mpies.errors import InputError
from mpies.tasks.base import Task


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
