"""The user's own data, for the user's own reward: prompts as text or as chat messages."""

from __future__ import annotations

from functools import partial
from typing import Any

from mpies import config
from mpies.errors import InputError
from mpies.tasks import data
from mpies.tasks.base import Reward, Row, Task

# What reward functions get under these names is not a column.
TAKEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def make_task(settings: config.TaskSettings, reward: Reward) -> Task:
    """From the files that are set. Raises InputError for bad data."""
    train, held_out = data.read_splits(settings, partial(check_row, column=settings.prompt_column))
    if len({isinstance(r["prompt"], str) for r in train + held_out}) > 1:
        raise InputError("task.train_data: some prompts are text and some are chat messages; make them alike")
    return Task("custom", train, held_out, reward)


def check_row(given: Row, column: str) -> Row:
    """A row with its prompt checked and put under `prompt`. Raises InputError with what is wrong."""
    if column not in given:
        raise InputError(
            f"no column {column!r}, only {', '.join(map(str, given))}; task.prompt_column names the one with"
            " the prompts"
        )
    if taken := [name for name in TAKEN if name in given]:
        raise InputError(
            f"column {taken[0]!r} has a name that reward functions use for something else; rename it"
        )
    others = {name: value for name, value in given.items() if name != "prompt"}
    return {"prompt": check_prompt(given[column], column), **others}


def check_prompt(given: Any, column: str) -> str | list[dict[str, Any]]:
    """Text, or chat messages with a role and text as content. Raises InputError for anything else."""
    if isinstance(given, str) and given:
        return given
    if isinstance(given, list) and given and all(map(_is_message, given)):
        return given
    raise InputError(
        f'{column}: given {given!r:.60}, needed is text, or chat messages such as [{{"role": "user",'
        ' "content": "..."}]'
    )


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(given.get(key), str) for key in ("role", "content"))
