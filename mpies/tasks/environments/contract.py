"""What an environment of plain text is, and how it is called, in its episode's own process.

    class Game:
        def reset(self, seed, **row) -> prompt                       # text, chat messages, or None: the row's
        def step(self, answer) -> (observation, reward, done)
        def metrics(self) -> {name: number}                          # may be left out

Methods may be `async`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpies.errors import InputError, reason
from mpies.tasks import users_code
from mpies.tasks.environments.limits import CHARACTERS

SETTING = "task.environment"
LARGEST = 1e100  # of the numbers that are added up
STEP = "needed is (observation, reward, done)"

Said = dict[str, Any]
"""What the rank is told: plain values for JSON; with `error`, a line of what went wrong."""


class NonsenseError(Exception):
    """What an environment returned is nothing to go on with."""


class TextClass:
    """The user's class. Raises InputError if it is not there, or is no environment."""

    def __init__(self, name: str):
        self.made = users_code.load(name, SETTING, inspect.isclass)
        for method in ("reset", "step"):
            if not callable(getattr(self.made, method, None)):
                raise InputError(f"{SETTING}: {name} has no method {method!r}, which an environment needs")
        self.takes_seed = takes(self.made.reset, "seed")

    def start(self) -> TextEpisode:
        return TextEpisode(self.made, self.takes_seed)


class UsersEpisode:
    """An episode of the user's code, from its making on: what both kinds of it have in common."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def answer(self, call: str, arguments: dict[str, Any]) -> Said:
        """What a call comes to: the method of that name, with an underscore, makes it."""
        try:
            return getattr(self, f"_{call}")(**arguments)
        except NonsenseError as error:
            return {"error": str(error)}
        except BaseException as error:  # whatever the user's code does to end this process, too
            return {"error": f"{call} raised {told(error)} ({users_code.place_of(error)})"}

    def value(self, made: Any) -> Any:
        """What a method returns, also an `async` one."""
        if not inspect.isawaitable(made):
            return made
        self.loop = self.loop or asyncio.new_event_loop()
        return self.loop.run_until_complete(made)


class TextEpisode(UsersEpisode):
    """One environment of plain text."""

    def __init__(self, made: Any, takes_seed: bool):
        super().__init__()
        self.made = made
        self.takes_seed = takes_seed

    def _reset(self, row: dict[str, Any], seed: int) -> Said:
        seed_generators(seed)
        self.environment = self.made()
        given = row if "seed" in row or not self.takes_seed else {**row, "seed": seed}
        prompt = checked_prompt(self.value(self.environment.reset(**given)))
        return {"prompt": prompt, "finishes": callable(getattr(self.environment, "metrics", None))}

    def _step(self, answer: str) -> Said:
        found = self.value(self.environment.step(answer))
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise NonsenseError(f"step returned {shown(found)}; {STEP}")
        observation, reward, done = found
        text = "" if observation is None else checked_text(observation, "step's observation")
        return {"text": text, "reward": checked_number(reward, "step's reward"), "done": bool(done)}

    def _finish(self) -> Said:
        found = self.value(self.environment.metrics())
        if not isinstance(found, Mapping):
            raise NonsenseError(f"metrics returned {shown(found)}; needed are names with numbers")
        return {"metrics": {str(n)[:100]: checked_number(v, f"metrics' {n}") for n, v in found.items()}}


def told(error: BaseException) -> str:
    """An error of the user's code, in a line."""
    return f"{type(error).__name__}: {reason(error)[:500]}"


def seed_generators(seed: int) -> None:
    """Whatever an environment draws from Python's or NumPy's own generators, it draws from its seed."""
    random.seed(seed)
    np.random.seed(seed)


def takes(function: Any, name: str) -> bool:
    """Can the function be called with an argument of that name?"""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    kinds = [parameter.kind for parameter in parameters.values()]
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def checked_prompt(found: Any) -> Any:
    """Text, chat messages, or None. Raises NonsenseError for anything else."""
    if found is None:
        return None
    if isinstance(found, str) and found:
        return checked_text(found, "reset's prompt")
    if isinstance(found, list) and found and all(map(is_message, found)):
        return [{"role": m["role"], "content": checked_text(m["content"], "a message")} for m in found]
    raise NonsenseError(f"reset returned {shown(found)}; needed is a prompt: text, or chat messages")


def is_message(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("role"), str) and "content" in found


def checked_text(found: Any, what: str) -> str:
    """Text that a tokenizer can read. Raises NonsenseError."""
    if not isinstance(found, str):
        raise NonsenseError(f"{what} is {shown(found)}; needed is text")
    if len(found) > CHARACTERS:
        raise NonsenseError(f"{what} has {len(found):,} characters; allowed are {CHARACTERS:,}")
    return found.encode(errors="replace").decode()


def checked_number(found: Any, what: str) -> float:
    """A number, of which any sum is finite. Raises NonsenseError."""
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(found, str | bytes) or not abs(number) <= LARGEST:
        largest = f" of {LARGEST:g} at most" if math.isfinite(number) else ""
        raise NonsenseError(f"{what} is {shown(found)}; needed is a number{largest}")
    return number


def shown(value: Any) -> str:
    """A value and its type, on a short line."""
    return f"{' '.join(reprlib.repr(value).split())[:80]} ({type(value).__name__})"
