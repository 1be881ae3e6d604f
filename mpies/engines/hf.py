"""The Hugging Face engine: decoding with transformers, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines import likelihood, rope
from mpies.engines.base import Completions, Draws, Prompt
from mpies.engines.cache import cache_argument
from mpies.engines.decode import Choose, decode, greedy
from mpies.engines.sampler import Sampler
from mpies.engines.text import Text
from mpies.errors import InputError


class HfEngine:
    """Decodes with `model` as it is at the time of the call."""

    held = 0
    at_once = False
    """Are given answers read at once? It takes more memory; in pieces, some models read them wrong."""

    def __init__(
        self,
        model: PreTrainedModel,
        text: Text,
        *,
        max_new_tokens: int,
        batch_size: int,
        on_rows: Callable[[torch.Tensor], None] = lambda members: None,
    ):
        if cache_argument(model) is None:
            raise InputError(
                f"engine.name: hf cannot decode {type(model).__name__}, which keeps no keys and values"
            )
        self.model = model
        self.text = text
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.on_rows = on_rows

    def refuse_dependent(self, prompts: Iterable[Prompt]) -> None:
        """Raise InputError if an answer to one of the prompts may depend on what else is in its batch."""
        if rope.reach(self.model.config) is not None:  # tokens of many prompts take a while
            longest = max((len(self.text.encode(prompt)) for prompt in prompts), default=0)
            rope.refuse_beyond(self.model, longest + self.max_new_tokens)

    def generate(self, prompts: list[Prompt]) -> Completions:
        return self.generate_block(prompts, 1)[0]

    def sample(self, prompts: list[Prompt], draws: Draws) -> Completions:
        encoded = [self.text.encode(prompt) for prompt in prompts]
        answers: list[list[int]] = [[]] * len(prompts)
        for chosen in _batches(encoded, self.batch_size):
            batch = self._decode([prompts[i] for i in chosen], 1, Sampler(draws.part(chosen)))
            for i, tokens in zip(chosen, batch, strict=True):
                answers[i] = tokens
        return self.text.completions(answers)

    def log_probabilities(
        self, prompts: list[Prompt], answers: list[list[int]], temperature: float = 1.0
    ) -> list[np.ndarray]:
        encoded = [self.text.encode(prompt) for prompt in prompts]
        found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
        for chosen in _batches(encoded, self.batch_size):
            pairs = [encoded[i] for i in chosen], [answers[i] for i in chosen]
            rope.refuse_beyond(self.model, max(len(p) + len(a) for p, a in zip(*pairs, strict=True)))
            inputs = [self.text.inputs(prompts[i]) for i in chosen]
            values = likelihood.of(self.model, *pairs, temperature, self.at_once, inputs)
            for i, row in zip(chosen, values, strict=True):
                found[i] = row
        return found

    def generate_block(self, prompts: list[Prompt], members: int) -> list[Completions]:
        encoded = [self.text.encode(prompt) for prompt in prompts]
        answers: list[list[list[int]]] = [[[]] * len(prompts) for _ in range(members)]
        for chosen in _batches(encoded, max(1, self.batch_size // members)):
            batch = self._decode([prompts[i] for i in chosen], members)
            for row, tokens in enumerate(batch):
                answers[row // len(chosen)][chosen[row % len(chosen)]] = tokens
        return [self.text.completions(mine) for mine in answers]

    def _decode(self, prompts: list[Prompt], members: int, choose: Choose = greedy) -> list[list[int]]:
        """Every member's answers to the prompts, one member after another."""
        encoded = [self.text.encode(prompt) for prompt in prompts]
        rope.refuse_beyond(self.model, max(map(len, encoded)) + self.max_new_tokens)

        def on_rows(rows: torch.Tensor) -> None:
            self.on_rows(rows // len(prompts))

        stops, inputs = self.text.stops, [self.text.inputs(prompt) for prompt in prompts] * members
        return decode(self.model, encoded * members, stops, self.max_new_tokens, on_rows, choose, inputs)


def _batches(encoded: list[list[int]], size: int) -> list[list[int]]:
    """The prompts that are decoded together, by number: similar lengths, to pad less or not at all."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[first : first + size] for first in range(0, len(order), size)]
