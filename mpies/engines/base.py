"""What every engine offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mpies.engines.tools import Tools

# Text, or chat messages: [{"role": "user", "content": "..."}, ...]. Where a message has images, its content
# is a list of parts: {"type": "text", "text": "..."}, {"type": "image", "image": Image}.
Prompt = str | list[dict[str, Any]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the text, or the last message's; of an episode without any, nothing."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
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

    def cut(self, pieces: int) -> list[Completions]:
        """Equal parts, one after another."""
        size = len(self.texts) // pieces
        cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
        return [
            Completions(self.texts[cut], self.tokens[cut], self.ids[cut], self.truncated[cut]) for cut in cuts
        ]


@dataclass(frozen=True)
class Draws:
    """Which random numbers the answers to a list of prompts are sampled with; see engines/sampler.py."""

    seed: int
    temperature: float
    """Greater than 0: tokens have probability softmax(logits / temperature)."""
    numbers: np.ndarray
    """Of each answer, uint64 (prompts,). Equal numbers mean equal random numbers."""
    before: np.ndarray | None = None
    """Tokens that were sampled with each of these numbers already, uint64 (prompts,); None: none."""

    def part(self, which: slice | list[int] | np.ndarray) -> Draws:
        """The draws of some of the prompts."""
        before = None if self.before is None else self.before[which]
        return Draws(self.seed, self.temperature, self.numbers[which], before)

    def places(self, rows: np.ndarray, place: int | np.ndarray) -> int | np.ndarray:
        """Where in all that is sampled with its number each of the answers `rows` has its token `place`."""
        return place if self.before is None else place + self.before[rows]


@dataclass(frozen=True)
class Conversations:
    """Which conversations prompts are the next turns of, by number; all others have ended."""

    kept: Any
    """What the engine's `keep` gave for these conversations."""
    numbers: list[int]


class Encoder(Protocol):
    """What tasks use of an engine's text.Text."""

    tools: Tools
    positions: int | None

    def encode(self, prompt: Prompt) -> list[int]: ...

    def continue_with(self, kept: str, text: str) -> tuple[list[int], int]:
        """Tokens of an answer that is `kept` and then `text`, and how many of them are before `text`."""
        ...


class Engine(Protocol):
    held: int
    """Bytes beyond the weights that the engine has had since it was made: a cache of its own."""
    text: Encoder
    max_new_tokens: int
    most_given: int | None
    """Tokens of a prompt and an answer that is given; None: any number."""
    keeps: bool
    """Does it keep anything of conversations from turn to turn? It may have found that it must not."""

    def keep(self) -> Any:
        """For what is kept of some conversations while they are played; None: nothing is."""
        ...

    def generate(self, prompts: list[Prompt], turns: Conversations | None = None) -> Completions:
        """Greedy completions. Deterministic for a list of prompts, given weights, threads, device.

        `turns`: which conversations' they are, here and below; then the earlier turns count as well.
        """
        ...

    def sample(self, prompts: list[Prompt], draws: Draws, turns: Conversations | None = None) -> Completions:
        """Sampled completions: a pure function of logits and draws, whatever else is in the list."""
        ...

    def log_probabilities(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        temperature: float = 1.0,
        *,
        members: list[int] | None = None,
        after: list[int] | None = None,
    ) -> list[np.ndarray]:
        """Of each answer's tokens, given its prompt and the tokens before: nat, float64 (tokens,).

        `members`: of the block, who reads each; None: the unperturbed model. `after`: of each answer only
        the tokens after so many.
        """
        ...

    def generate_each(
        self, prompts: list[Prompt], members: list[int], turns: Conversations | None = None
    ) -> Completions:
        """Each prompt's completion by the member with that number in the block, of all that the model
        computes with at once (see lowrank.py)."""
        ...

    def generate_block(self, prompts: list[Prompt], members: int) -> list[Completions]:
        """The prompts' completions by each of the block's members."""
        return self.generate_each(prompts * members, owners(len(prompts), members)).cut(members)


def owners(prompts: int, members: int) -> list[int]:
    """Of so many prompts to each member, one member after another: whose each is."""
    return [member for member in range(members) for _ in range(prompts)]
