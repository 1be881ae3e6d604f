"""TRL's environments and tools, and how they are called, in their episode's own process.

    class Shop:
        def reset(self, **row) -> str | None          # added to the prompt's last message
        def get_reward(self) -> float                 # may be left out
        def buy(self, item: str, count: int) -> str:  # public methods are tools; they have a docstring
            ...

Methods and tools may be `async`. What a tool raises is told to the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mpies.errors import InputError
from mpies.tasks import users_code
from mpies.tasks.environments.contract import (
    CHARACTERS,
    NonsenseError,
    Said,
    UsersEpisode,
    checked_number,
    checked_text,
    seed_generators,
    shown,
    takes,
)

FACTORY, TOOLS = "task.environment_factory", "task.tools"
RESERVED = ("reset", "get_reward")
ONLY = ""
"""The name of an environment that all rows have; others are named by a row's column `environment`."""
ROUTE = "environment"


class ToolKit:
    """The user's factories by name, none or some, and tools. Raises InputError if they are not there."""

    def __init__(self, factories: dict[str, str], tools: list[str]):
        classes = {
            name: users_code.load(place, FACTORY, inspect.isclass) for name, place in factories.items()
        }
        for name, made in classes.items():
            if inspect.isclass(made) and not callable(getattr(made, "reset", None)):
                raise InputError(f"{FACTORY}: {factories[name]} has no method 'reset', which it needs")
        self.factories: dict[str, Callable[[], Any]] = classes
        self.tools: dict[str, Callable[..., Any]] = {}
        for place in tools:
            name = place.rpartition(":")[2]
            if name in self.tools:
                raise InputError(f"{TOOLS}: two of them have the name {name!r}")
            self.tools[name] = users_code.load(place, TOOLS)

    def start(self) -> ToolEpisode:
        return ToolEpisode(self)


class ToolEpisode(UsersEpisode):
    """One environment, or none, and tools."""

    def __init__(self, kit: ToolKit):
        super().__init__()
        self.kit = kit
        self.environment: Any = None
        self.tools: dict[str, Callable[..., Any]] = dict(kit.tools)

    def _describe(self) -> Said:
        """Each environment's tools as transformers describes them, and whether it rewards."""
        from transformers.utils import get_json_schema

        found = {}
        for name in self.kit.factories or [ONLY]:
            self._make(name)
            found[name] = {
                "tools": [get_json_schema(tool) for tool in self.tools.values()],
                "rewards": self._rewards(),
            }
        return {"environments": found}

    def _reset(self, row: dict[str, Any], seed: int) -> Said:
        seed_generators(seed)
        if not self.kit.factories:
            return {"prompt": None, "finishes": False}
        several = ONLY not in self.kit.factories
        self._make(row.get(ROUTE, "") if several else ONLY)
        given = {name: value for name, value in row.items() if not several or name != ROUTE}
        if "seed" not in row and takes_by_name(self.environment.reset, "seed"):
            given["seed"] = seed
        found = self.value(self.environment.reset(**given))
        prompt = None if found is None else checked_text(found, "reset's text")
        return {"prompt": prompt, "finishes": self._rewards()}

    def _make(self, name: str) -> None:
        if not self.kit.factories:
            return
        if name not in self.kit.factories:
            known = ", ".join(self.kit.factories)
            raise NonsenseError(f"the row's column `{ROUTE}` is {shown(name)}; there are {known}")
        self.environment = self.kit.factories[name]()
        methods = inspect.getmembers(type(self.environment), predicate=inspect.isfunction)
        public = [n for n, _ in methods if n not in RESERVED and not n.startswith("_")]
        if twice := self.kit.tools.keys() & set(public):
            raise NonsenseError(f"{sorted(twice)[0]!r} is a method of the environment's, and one of {TOOLS}")
        self.tools = self.kit.tools | {n: getattr(self.environment, n) for n in public}

    def _rewards(self) -> bool:
        return callable(getattr(self.environment, "get_reward", None))

    def _use(self, calls: list[dict[str, Any]]) -> Said:
        """Call tools, one after another: the results as text, and whether each is an error."""
        results = [self._used(call["name"], call["arguments"]) for call in calls]
        return {"results": [text for text, _ in results], "errors": [bad for _, bad in results]}

    def _used(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        try:
            if name not in self.tools:
                raise ValueError(f"Tool {name[:100]} not found.")
            found = str(self.value(self.tools[name](**arguments)))
        except Exception as error:  # as in TRL, for the model to read; SystemExit ends the episode
            return str({"error": str(error)[:1000]}), True
        return checked_text(found[:CHARACTERS], "a tool's result"), False

    def _finish(self) -> Said:
        return {"reward": checked_number(self.value(self.environment.get_reward()), "get_reward's value")}

    def _attribute(self, name: str) -> Said:
        """For reward functions, which look at environments."""
        found = getattr(self.environment, name)
        return {"callable": True} if callable(found) else {"value": found}

    def _method(self, name: str, given: list[Any], named: dict[str, Any]) -> Said:
        return {"value": self.value(getattr(self.environment, name)(*given, **named))}


def takes_by_name(function: Any, name: str) -> bool:
    """Has it an argument of its own of that name? Others would find a column more than in TRL."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return takes(function, name)
