"""The user's own data, for the user's own reward: prompts as text or as chat messages."""

from __future__ import annotations

import reprlib
from functools import partial
from pathlib import Path
from typing import Any

from mpies import config
from mpies.engines.base import Prompt, prompt_text
from mpies.engines.image import Image
from mpies.errors import InputError
from mpies.tasks import data
from mpies.tasks.base import Reward, Row, Task
from mpies.tasks.environments.contract import is_message

# What reward functions get under these names is not a column.
TAKEN = ("prompts", "completions", "environments", "trainer_state", "log_extra", "log_metric")

MOST_IMAGES = 256  # of a row
LONGEST = 1_000_000  # characters of a prompt, more than models have positions for
PART = '{"type": "text", "text": "..."} or {"type": "image", "image": "FILE"}'


def make_task(settings: config.TaskSettings, reward: Reward) -> Task:
    """From the files that are set. Raises InputError for bad data."""
    check = partial(check_row, column=settings.prompt_column, image_column=settings.image_column)
    train, held_out = data.read_splits(settings, check)
    if len({isinstance(r["prompt"], str) for r in train + held_out}) > 1:
        raise InputError("task.train_data: some prompts are text and some are chat messages; make them alike")
    return Task("custom", train, held_out, reward)


def check_row(given: Row, column: str, image_column: str = "", folder: Path | None = None) -> Row:
    """A row with its prompt checked and put under `prompt`. Raises InputError with what is wrong.

    Images are in `folder`, if their paths are relative; None: there may be none. Those of the row's
    `image_column` are put into the prompt, where parts of type image are without one, or before its first
    user's text; prompts are messages then.
    """
    if column not in given:
        raise InputError(
            f"no column {column!r}, only {', '.join(map(str, given))}; task.prompt_column names the one with"
            " the prompts"
        )
    check_names(given)
    others = {name: value for name, value in given.items() if name != "prompt"}
    images: list[Image] = []
    if image_column:
        if image_column not in given:
            raise InputError(f"no column {image_column!r}, which task.image_column names")
        images = _images(given[image_column], image_column, folder)
        others[image_column] = images
    prompt = check_prompt(given[column], column, folder)
    if image_column and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt if isinstance(prompt, str) else with_images(prompt, images), **others}


def check_names(given: Row) -> Row:
    """The row itself. Raises InputError if a column has a name that is taken."""
    if taken := [name for name in TAKEN if name in given]:
        raise InputError(
            f"column {taken[0]!r} has a name that reward functions use for something else; rename it"
        )
    return given


def _images(given: Any, column: str, folder: Path | None) -> list[Image]:
    listed = given if isinstance(given, list) else [given] if given is not None else []
    if len(listed) > MOST_IMAGES:
        raise InputError(f"{column}: given {len(listed)} images, allowed are up to {MOST_IMAGES}")
    return [_image(one, f"{column}[{number}]", folder) for number, one in enumerate(listed)]


def _image(given: Any, place: str, folder: Path | None) -> Image:
    if folder is None:
        raise InputError(f"{place}: given an image; images are for task.name=custom, leave the row out")
    try:
        return Image.of(given, folder)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def with_images(messages: list[dict[str, Any]], images: list[Image]) -> list[dict[str, Any]]:
    """A prompt's messages with these images. Raises InputError if they have parts for more or fewer."""
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    empty = [part for part in parts if part == {"type": "image"}]
    if not empty and images:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        text = first["content"]
        rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
        first["content"] = [*({"type": "image", "image": image} for image in images), *rest]
        return messages
    if len(empty) != len(images):
        raise InputError(
            f"its prompt has {len(empty)} part(s) of type image without an image, but the row has"
            f" {len(images)} image(s); task.image_column names their column"
        )
    for part, image in zip(empty, images, strict=True):
        part["image"] = image
    return messages


def check_prompt(given: Any, column: str, folder: Path | None = None) -> Prompt:
    """Text, or chat messages with a role and content. Raises InputError for anything else.

    Content in parts of type text is joined, as chat templates do it; with images, it stays in parts.
    """
    if isinstance(given, str) and given:
        _refuse_endless(len(given), column)
        _refuse_surrogates(given, column)
        return given
    if isinstance(given, list) and given and all(map(is_message, given)):
        made = [
            {**message, "content": _content(message, f"{column}[{number}].content", folder)}
            for number, message in enumerate(given)
        ]
        _refuse_endless(sum(len(prompt_text([message])) for message in made), column)
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


def _content(message: dict[str, Any], place: str, folder: Path | None) -> str | list[dict[str, Any]]:
    """What a message says: text, or parts if there are images. Raises InputError where it is neither."""
    content = message["content"]
    if isinstance(content, str):
        _refuse_surrogates(content, place)
        return content
    if isinstance(content, list) and content:
        parts = [_part(part, f"{place}[{number}]", folder) for number, part in enumerate(content)]
        if len(images := [part for part in parts if part["type"] == "image"]) > MOST_IMAGES:
            raise InputError(f"{place}: given {len(images)} images, allowed are up to {MOST_IMAGES}")
        return parts if images else "".join(part["text"] for part in parts)
    remedy = f", or parts such as {PART}"
    if content is None and message.get("tool_calls"):
        remedy = "; write what the message's tool_calls say as text, or leave the row out"
    raise InputError(f"{place}: given {reprlib.repr(content)}, needed is text{remedy}")


def _part(part: Any, place: str, folder: Path | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "bytes") if part.get(key) is not None), None)
        return {"type": kind} if source is None else {"type": kind, "image": _image(source, place, folder)}
    if isinstance(kind, str) and kind != "text":
        raise InputError(
            f"{place}: given a part of type {kind!r:.40}; models are given text and images only, as {PART};"
            " leave the row out"
        )
    text = part.get("text") if kind else None
    if not isinstance(text, str):
        raise InputError(f"{place}: given {reprlib.repr(part)}, needed is a part such as {PART}")
    _refuse_surrogates(text, place)
    return {"type": "text", "text": text}
