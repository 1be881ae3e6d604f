"""What every engine offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

# Text, or chat messages: [{"role": "user", "content": "..."}, ...]. Where a message has images, its content
# is a list of parts: {"type": "text", "text": "..."}, {"type": "image", "image": Image}.
Prompt = str | list[dict[str, Any]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the text, or the last message's."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


@dataclass(frozen=True)
class Completions:
    """The answers to a list of prompts, in its order."""

    texts: list[str]
    tokens: list[int]
    """Generated tokens of each answer, the end of sequence included."""
    ids: list[list[int]] = field(default_factory=list)
    """Those tokens."""
    truncated: list[bool] = field(default_factory=list)
    """Did it end because it was as long as it may be, and not by itself?"""


@dataclass(frozen=True)
class Draws:
    """Which random numbers the answers to a list of prompts are sampled with; see engines/sampler.py."""

    seed: int
    temperature: float
    """Greater than 0: tokens have probability softmax(logits / temperature)."""
    numbers: np.ndarray
    """Of each answer, uint64 (prompts,). Equal numbers mean equal random numbers."""

    def part(self, which: slice | list[int]) -> Draws:
        """The draws of some of the prompts."""
        return Draws(self.seed, self.temperature, self.numbers[which])


class Engine(Protocol):
    held: int
    """Bytes beyond the weights that the engine has had since it was made: a cache of its own."""

    def generate(self, prompts: list[Prompt]) -> Completions:
        """Greedy completions. Deterministic for a list of prompts, given weights, threads, device."""
        ...

    def sample(self, prompts: list[Prompt], draws: Draws) -> Completions:
        """Sampled completions: a pure function of logits and draws, whatever else is in the list."""
        ...

    def log_probabilities(
        self, prompts: list[Prompt], answers: list[list[int]], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Of each answer's tokens, given its prompt and the tokens before: nat, float64 (tokens,)."""
        ...

    def generate_block(self, prompts: list[Prompt], members: int) -> list[Completions]:
        """Completions by each of the members that the model computes with at once (see lowrank.py)."""
        ...
