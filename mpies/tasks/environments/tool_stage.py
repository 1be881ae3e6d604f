"""A block's episodes with tools: what the model calls is called, until it calls nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpies.engines.base import Prompt
from mpies.engines.calls import Schema
from mpies.engines.tools import Chat, Message, Tools
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.stage import EnvironmentStage
from mpies.tasks.environments.tool_contract import ONLY, ROUTE
from mpies.tasks.episodes import Episode, Reply, Turn


@dataclass(frozen=True)
class Read:
    """An answer, read: the conversation with it, its calls, and what is no call."""

    conversation: Chat
    calls: list[dict[str, Any]]
    problems: list[str]


class ToolStage(EnvironmentStage):
    """`schemas`: of the tools of each environment, by its name. `tools`: what the model's tokenizer knows."""

    def __init__(
        self,
        nursery: Nursery,
        episodes: Sequence[Episode],
        schemas: dict[str, list[Schema]],
        tools: Tools | None,
    ):
        super().__init__(nursery, episodes)
        self._schemas = schemas
        self._tools = tools

    def begin(self) -> dict[int, Reply]:
        return {i: self._with_tools(i, reply) for i, reply in super().begin().items()}

    def opened(self, given: Prompt, said: Prompt | None) -> Prompt:
        """As in TRL: what `reset` says is added to the last message."""
        messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
        last = messages[-1]
        added = {**last, "content": last["content"] + (said if isinstance(said, str) else "")}
        return [*messages[:-1], added] if added["content"] else []

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]:
        read = {i: self._read(turn) for i, turn in answers.items()}
        found = self.called("use", {i: {"calls": one.calls} for i, one in read.items() if one.calls})
        return {i: _replied(one, found.get(i, {})) for i, one in read.items()}

    @property
    def environments(self) -> list[EnvironmentView]:
        """Each episode's, for reward functions."""
        return [EnvironmentView(self._asker(i)) for i in range(len(self.episodes))]

    def _with_tools(self, i: int, reply: Reply) -> Reply:
        if reply.error:
            return reply
        name = ONLY if ONLY in self._schemas else self.episodes[i].start.row[ROUTE]
        return Reply(Chat(list(reply.conversation), self._schemas[name]))  # type: ignore[arg-type]

    def _read(self, turn: Turn) -> Read:
        assert self._tools and isinstance(turn.prompt, Chat)
        message, problems = self._tools.read(turn.ids, turn.text, turn.prompt)
        calls = [call["function"] for call in message.get("tool_calls", [])]
        return Read(turn.prompt.with_messages(message), calls, problems)

    def _asker(self, i: int) -> Callable[[str, dict[str, Any]], Any]:
        def ask(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            return self.called(name, {i: arguments})[i]

        return ask


class EnvironmentView:
    """An episode's environment as reward functions see it: its attributes and methods, as plain values."""

    def __init__(self, ask: Callable[[str, dict[str, Any]], Any]):
        self._ask = ask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        said = self._ask("attribute", {"name": name})
        if "error" in said:
            raise AttributeError(f"{name}: {said['error']}")
        return self._method(name) if "callable" in said else said["value"]

    def _method(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            said = self._ask("method", {"name": name, "given": list(given), "named": named})
            if "error" in said:
                raise RuntimeError(said["error"])
            return said["value"]

        return call


def _replied(read: Read, said: dict[str, Any]) -> Reply:
    """What comes of an answer. One without a call, and without what was meant as one, is the last."""
    if "error" in said:
        return Reply(read.conversation, error=said["error"], calls=len(read.calls))
    names = [call["name"] for call in read.calls]
    told: list[Message] = [
        {"role": "tool", "name": name, "content": text} for name, text in zip(names, said.get("results", []))
    ]
    told += [{"role": "tool", "name": "unknown", "content": str({"error": text})} for text in read.problems]
    return Reply(
        read.conversation.with_messages(*told),
        done=not told,
        calls=len(read.calls) + len(read.problems),
        bad_calls=sum(said.get("errors", [])) + len(read.problems),
    )
