"""A block's episodes in environments: each in a process of its own, called all together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mpies.engines.base import Prompt
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.contract import Said
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.episodes import FAILED, Episode, Reply, Turn


class ProcessStage(ABC):
    """What stages of all kinds have in common."""

    def __init__(self, nursery: Nursery, episodes: Sequence[Episode]):
        self.nursery = nursery
        self.episodes = episodes
        self.keys = nursery.numbers(len(episodes))

    @property
    def beginnings(self) -> dict[int, dict[str, Any]]:
        """What each episode is told first."""
        starts = enumerate(one.start for one in self.episodes)
        return {i: {"row": one.row, "seed": one.seed} for i, one in starts}

    @property
    def environments(self) -> Sequence[Any] | None:
        """Each episode's, for reward functions; None: they are not for them."""
        return None

    @abstractmethod
    def begin(self) -> dict[int, Reply]: ...

    @abstractmethod
    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]: ...

    @abstractmethod
    def finish(self) -> None: ...

    def close(self) -> None:
        """Have the episodes' processes ended, while the rank goes on."""
        self.nursery.end(self.keys)

    def called(self, name: str, each: dict[int, dict[str, Any]]) -> dict[int, Said]:
        """What a call with each episode's arguments comes to."""
        calls = [Call(self.keys[i], name, arguments) for i, arguments in each.items()]
        return dict(zip(each, self.nursery.call(calls) if calls else [], strict=True))


class EnvironmentStage(ProcessStage):
    """What stages of the kinds have in common whose environments are asked what they say to an answer."""

    def __init__(self, nursery: Nursery, episodes: Sequence[Episode]):
        super().__init__(nursery, episodes)
        self._finishing: set[int] = set()

    def begin(self) -> dict[int, Reply]:
        found = self.called("reset", self.beginnings)
        return {i: self._begun(i, said) for i, said in found.items()}

    @abstractmethod
    def opened(self, given: Prompt, said: Prompt | None) -> Prompt:
        """The conversation that begins with a row's prompt, empty if it has none, and what `reset` said."""

    def finish(self) -> None:
        asked = [i for i in sorted(self._finishing) if self.episodes[i].ended != FAILED]
        for i, said in self.called("finish", {i: {} for i in asked}).items():
            one = self.episodes[i]
            last = Reply(one.conversation, said.get("reward", 0.0), error=said.get("error", ""))
            one.take(last)
            one.metrics.update(said.get("metrics", {}))

    def _begun(self, i: int, said: Said) -> Reply:
        given = self.episodes[i].start.row.get("prompt") or ""
        if "error" in said:
            return Reply(given, error=said["error"])
        if said["finishes"]:
            self._finishing.add(i)
        conversation = self.opened(given, said["prompt"])
        return Reply(conversation, error="" if conversation else "reset gave no prompt, and the row has none")


class TextStage(EnvironmentStage):
    """Environments of plain text. `chat`: texts become messages of a chat; else, a conversation is a text."""

    def __init__(self, nursery: Nursery, episodes: Sequence[Episode], chat: bool):
        super().__init__(nursery, episodes)
        self._chat = chat

    def opened(self, given: Prompt, said: Prompt | None) -> Prompt:
        prompt = said or given
        if self._chat and isinstance(prompt, str) and prompt:
            return [{"role": "user", "content": prompt}]
        return prompt

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]:
        found = self.called("step", {i: {"answer": turn.text} for i, turn in answers.items()})
        return {i: stepped(answers[i], found[i]) for i in answers}


def stepped(turn: Turn, said: Said) -> Reply:
    if "error" in said:
        return Reply(grown(turn.prompt, turn.text, ""), error=said["error"])
    conversation = grown(turn.prompt, turn.text, said["text"])
    return Reply(conversation, said["reward"], said["done"])


def grown(conversation: Prompt, answer: str, observation: str) -> Prompt:
    """The conversation with an answer, and with what was observed then, if there was anything."""
    if isinstance(conversation, str):
        return conversation + answer + observation
    more: list[dict[str, Any]] = [{"role": "assistant", "content": answer}]
    if observation:
        more.append({"role": "user", "content": observation})
    return [*conversation, *more]
