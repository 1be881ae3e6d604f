"""What every engine offers."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    ids: list[list[int]] = field(default_factory=list)
    """Those tokens."""


class Engine(Protocol):
    def generate(self, prompts: list[Prompt]) -> Completions:
        """Greedy completions. Deterministic for a list of prompts, given weights, threads, device."""
        ...

    def generate_block(self, prompts: list[Prompt], members: int) -> list[Completions]:
        """Completions by each of the members that the model computes with at once (see lowrank.py)."""
        ...
