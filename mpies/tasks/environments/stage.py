"""A block's episodes in environments of plain text: each in a process of its own, called all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpies.engines.base import Prompt
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.contract import Said
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.episodes import FAILED, Episode, Reply, Turn


class TextStage:
    """`chat`: texts become messages of a chat; else, a conversation is one text."""

    def __init__(self, nursery: Nursery, episodes: Sequence[Episode], chat: bool):
        self._nursery = nursery
        self._episodes = episodes
        self._chat = chat
        self._keys = nursery.numbers(len(episodes))
        self._with_metrics: set[int] = set()

    def close(self) -> None:
        """End the episodes' processes."""
        self._nursery.call([], self._keys)

    def begin(self) -> dict[int, Reply]:
        starts = enumerate(one.start for one in self._episodes)
        found = self._called("reset", {i: {"row": one.row, "seed": one.seed} for i, one in starts})
        return {i: self._begun(i, said) for i, said in found.items()}

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]:
        found = self._called("step", {i: {"answer": turn.text} for i, turn in answers.items()})
        return {i: self._stepped(answers[i], found[i]) for i in answers}

    def finish(self) -> None:
        asked = [i for i in sorted(self._with_metrics) if self._episodes[i].ended != FAILED]
        for i, said in self._called("metrics", {i: {} for i in asked}).items():
            if "error" in said:
                self._episodes[i].take(Reply(self._episodes[i].conversation, error=said["error"]))
            else:
                self._episodes[i].metrics.update(said["metrics"])

    def _called(self, name: str, each: dict[int, dict[str, Any]]) -> dict[int, Said]:
        """What a call with each episode's arguments comes to."""
        calls = [Call(self._keys[i], name, arguments) for i, arguments in each.items()]
        return dict(zip(each, self._nursery.call(calls) if calls else [], strict=True))

    def _begun(self, i: int, said: Said) -> Reply:
        given = self._episodes[i].start.row.get("prompt", "")
        if "error" in said:
            return Reply(given, error=said["error"])
        if said["metrics"]:
            self._with_metrics.add(i)
        prompt = said["prompt"] or given
        if not prompt:
            return Reply("", error="reset returned None, and the row has no prompt")
        return Reply(opening(prompt, self._chat))

    def _stepped(self, turn: Turn, said: Said) -> Reply:
        if "error" in said:
            return Reply(grown(turn.prompt, turn.text, ""), error=said["error"])
        conversation = grown(turn.prompt, turn.text, said["text"])
        return Reply(conversation, said["reward"], said["done"])


def opening(prompt: Prompt, chat: bool) -> Prompt:
    """The conversation that begins with a prompt."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def grown(conversation: Prompt, answer: str, observation: str) -> Prompt:
    """The conversation with an answer, and with what was observed then, if there was anything."""
    if isinstance(conversation, str):
        return conversation + answer + observation
    more: list[dict[str, Any]] = [{"role": "assistant", "content": answer}]
    if observation:
        more.append({"role": "user", "content": observation})
    return [*conversation, *more]
