"""The Hugging Face engine: decoding with transformers, in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines import likelihood, rope
from mpies.engines.base import Completions, Conversations, Draws, Engine, Prompt
from mpies.engines.cache import cache_argument, cache_for, keeps_all
from mpies.engines.decode import Choose, decode, greedy
from mpies.engines.image import images_in
from mpies.engines.reading import OnRows
from mpies.engines.sampler import Sampler
from mpies.engines.text import Text
from mpies.engines.turns import KeptTurns, Part, Past
from mpies.errors import InputError

# Tokens of prompts, and of what is kept of answers, that are read at a time before given tokens. A CPU reads
# slower what its caches do not hold.
PREFILL, PREFILL_ON_CPU = 2**15, 2**12


class HfEngine(Engine):
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
        version: Callable[[], int] | None = None,
    ):
        """`version`: of what the model computes, where keys and values are kept from turn to turn (turns.py).

        Models whose caches have states, which cannot be cut back, read every turn anew.
        """
        if cache_argument(model) is None:
            raise InputError(
                f"engine.name: hf cannot decode {type(model).__name__}, which keeps no keys and values"
            )
        self.model = model
        self.text = text
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.on_rows = on_rows
        self.version = version
        self.prefill = PREFILL_ON_CPU if model.device.type == "cpu" else PREFILL
        self.keeps = version is not None and keeps_all(cache_for(model, 0))
        self.most_given = min(filter(None, (text.positions, rope.reach(model.config))), default=None)

    def refuse_dependent(self, prompts: Iterable[Prompt], most: int | None = None) -> None:
        """Raise InputError if an answer to one of the prompts may depend on what else is in its batch.

        `most`: tokens that a conversation may come to.
        """
        if rope.reach(self.model.config) is not None:  # tokens of many prompts take a while
            longest = max((len(self.text.encode(prompt)) for prompt in prompts), default=0)
            rope.refuse_beyond(self.model, most or longest + self.max_new_tokens)

    def keep(self) -> KeptTurns | None:
        return KeptTurns(self.version) if self.keeps and self.version else None

    def generate(self, prompts: list[Prompt], turns: Conversations | None = None) -> Completions:
        return self.generate_each(prompts, [0] * len(prompts), turns)

    def sample(self, prompts: list[Prompt], draws: Draws, turns: Conversations | None = None) -> Completions:
        def choose(chosen: list[int]) -> Choose:
            return Sampler(draws.part(chosen))

        return self._answer(prompts, [0] * len(prompts), turns, choose)

    def log_probabilities(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        temperature: float = 1.0,
        *,
        members: list[int] | None = None,
        after: list[int] | None = None,
    ) -> list[np.ndarray]:
        members = [0] * len(prompts) if members is None else members
        after = [0] * len(prompts) if after is None else after
        # What is before a place is read with the prompt, but for those with images, which are read alone.
        early = [0 if images_in(prompt) else place for prompt, place in zip(prompts, after, strict=True)]
        given = zip(prompts, answers, early, strict=True)
        read = [
            (self.text.encode(prompt) + answer[:place], answer[place:]) for prompt, answer, place in given
        ]
        found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
        batches = _batches([before for before, _ in read], members, self.batch_size)
        for chosen in [part for batch in batches for part in self._fitting(batch, read)]:
            rope.refuse_beyond(self.model, max(sum(map(len, read[i])) for i in chosen))
            values = likelihood.of(
                self.model,
                [read[i][0] for i in chosen],
                [read[i][1] for i in chosen],
                temperature,
                self.at_once,
                [self.text.inputs(prompts[i]) for i in chosen],
                self._on_rows([members[i] for i in chosen]),
            )
            for i, row in zip(chosen, values, strict=True):
                found[i] = row[after[i] - early[i] :]
        return found

    def generate_each(
        self, prompts: list[Prompt], members: list[int], turns: Conversations | None = None
    ) -> Completions:
        return self._answer(prompts, members, turns, lambda chosen: greedy)

    def _answer(
        self,
        prompts: list[Prompt],
        members: list[int],
        turns: Conversations | None,
        choose: Callable[[list[int]], Choose],
    ) -> Completions:
        """What was kept is for the first batch, and what is kept is of it: a batch at most."""
        encoded = [self.text.encode(prompt) for prompt in prompts]
        answers: list[list[int]] = [[]] * len(prompts)
        if turns and any(images_in(prompt) for prompt in prompts):  # positions of what follows them vary
            turns = None
        pasts: list[Past | None] = [None] * len(prompts)
        if turns:
            owners = list(zip(members, turns.numbers, strict=True))
            pasts = turns.kept.recall(owners, encoded)
        for number, chosen in enumerate(_batches(encoded, members, self.batch_size, pasts)):
            of_first: list[Past | None] = [] if number else [pasts[i] for i in chosen]
            pasts = []  # what has not come into it is let go
            parts: list[Part] | None = [] if turns and not number else None
            batch = self._decode(prompts, members, chosen, choose(chosen), of_first, parts)
            for i, tokens in zip(chosen, batch, strict=True):
                answers[i] = tokens
            if turns and parts:
                turns.kept.keep([owners[i] for i in chosen], [encoded[i] for i in chosen], batch, parts)
        return self.text.completions(answers)

    def _decode(
        self,
        prompts: list[Prompt],
        members: list[int],
        chosen: list[int],
        choose: Choose,
        pasts: Sequence[Past | None],
        parts: list[Part] | None,
    ) -> list[list[int]]:
        """The answers to the chosen prompts, each by its member."""
        encoded = [self.text.encode(prompts[i]) for i in chosen]
        rope.refuse_beyond(self.model, max(map(len, encoded)) + self.max_new_tokens)
        on_rows = self._on_rows([members[i] for i in chosen])
        stops, inputs = self.text.stops, [self.text.inputs(prompts[i]) for i in chosen]
        return decode(self.model, encoded, stops, self.max_new_tokens, on_rows, choose, inputs, pasts, parts)

    def _fitting(self, batch: list[int], read: list[tuple[list[int], list[int]]]) -> list[list[int]]:
        """The batch, or parts of it, by number: what pads shorter prompts and answers has positions, too.

        `read`: each one's prompt and answer.
        """
        prompt, answer = (max(len(read[i][part]) for i in batch) for part in (0, 1))
        beyond = self.most_given is not None and prompt + answer > self.most_given
        if len(batch) == 1 or (not beyond and len(batch) * prompt <= self.prefill):
            return [batch]
        middle = len(batch) // 2
        return self._fitting(batch[:middle], read) + self._fitting(batch[middle:], read)

    def _on_rows(self, members: list[int]) -> OnRows:
        """Tells whose the rows of a forward pass are, of a batch that is these members'."""
        owners = torch.tensor(members, device=self.model.device)
        return lambda rows: self.on_rows(owners[rows])


def _batches(
    encoded: list[list[int]], members: list[int], size: int, pasts: Sequence[Past | None] = ()
) -> list[list[int]]:
    """The prompts that are decoded together, by number, one member's after another's.

    They have similar lengths, to pad less or not at all; where all members have the same prompts, a batch
    has the same ones of each. Those that go on from what was kept, where `pasts` are given, are first.
    """
    seen: Counter[int] = Counter()
    turns = []  # each prompt's index among its own member's prompts
    for member in members:
        turns.append(seen[member])
        seen[member] += 1
    anew = [not past for past in pasts] or [True] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: (anew[i], len(encoded[i]), turns[i], members[i]))
    several = max(1, len(seen))
    size = max(1, size // several) * several
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [sorted(batch, key=lambda i: members[i]) for batch in batches]
