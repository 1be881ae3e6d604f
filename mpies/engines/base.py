"""What every engine offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# Text, or chat messages: [{"role": "user", "content": "..."}, ...].
Prompt = str | list[dict[str, str]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@dataclass(frozen=True)
class Completions:
    """The answers to a list of prompts, in its order."""

    texts: list[str]
    tokens: list[int]
    """Generated tokens of each answer, the end of sequence included."""


class Engine(Protocol):
    def generate(self, prompts: list[Prompt], members: int = 1) -> list[Completions]:
        """Greedy completions by each of `members` members that the model computes with at once.

        Deterministic for a list of prompts, given weights, members, threads, device.
        """
        ...
