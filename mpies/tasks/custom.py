"""The user's own data, for the user's own reward: prompts as text or as chat messages."""

from __future__ import annotations

import reprlib
from functools import partial
from typing import Any

from mpies import config
from mpies.errors import InputError
from mpies.tasks import data
from mpies.tasks.base import Reward, Row, Task

# What reward functions get under these names is not a column.
TAKEN = ("prompts", "completions", "environments", "trainer_state", "log_extra", "log_metric")

LONGEST = 1_000_000  # characters of a prompt, more than models have positions for
PART = '{"type": "text", "text": "..."}'


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
    check_names(given)
    others = {name: value for name, value in given.items() if name != "prompt"}
    return {"prompt": check_prompt(given[column], column), **others}


def check_names(given: Row) -> Row:
    """The row itself. Raises InputError if a column has a name that is taken."""
    if taken := [name for name in TAKEN if name in given]:
        raise InputError(
            f"column {taken[0]!r} has a name that reward functions use for something else; rename it"
        )
    return given


def check_prompt(given: Any, column: str) -> str | list[dict[str, Any]]:
    """Text, or chat messages with a role and text as content. Raises InputError for anything else.

    Content in parts of type text is joined, as chat templates do it.
    """
    if isinstance(given, str) and given:
        _refuse_endless(len(given), column)
        _refuse_surrogates(given, column)
        return given
    if isinstance(given, list) and given and all(map(_is_message, given)):
        made = [
            {**message, "content": _text(message, f"{column}[{number}].content")}
            for number, message in enumerate(given)
        ]
        _refuse_endless(sum(len(message["content"]) for message in made), column)
        return made
    raise InputError(
        f'{column}: given {given!r:.60}, needed is text, or chat messages such as [{{"role": "user",'
        ' "content": "..."}]'
    )


def _refuse_endless(characters: int, column: str) -> None:
    """Before anything makes tokens of it, which takes a minute for 10 MB."""
    if characters > LONGEST:
        raise InputError(
            f"{column}: given {characters:,} characters, allowed are up to {LONGEST:,}; shorten it, or leave"
            " the row out"
        )


def _refuse_surrogates(text: str, place: str) -> None:
    """JSON can hold halves of characters, of which no tokenizer makes tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: character {error.start + 1} is {text[error.start]!a}, half of a character; correct"
            " the text, or leave the row out"
        ) from None


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("role"), str) and "content" in given


def _text(message: dict[str, Any], place: str) -> str:
    """What a message says. Raises InputError where that is not text alone."""
    content = message["content"]
    if isinstance(content, str):
        _refuse_surrogates(content, place)
        return content
    if isinstance(content, list) and content:
        return "".join(_part(part, f"{place}[{number}]") for number, part in enumerate(content))
    remedy = f", or parts such as {PART}"
    if content is None and message.get("tool_calls"):
        remedy = "; write what the message's tool_calls say as text, or leave the row out"
    raise InputError(f"{place}: given {reprlib.repr(content)}, needed is text{remedy}")


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise InputError(
            f"{place}: given a part of type {kind!r:.40}; models are given text only, leave the row out"
        )
    text = part.get("text") if kind else None
    if not isinstance(text, str):
        raise InputError(f"{place}: given {reprlib.repr(part)}, needed is a part such as {PART}")
    _refuse_surrogates(text, place)
    return text
