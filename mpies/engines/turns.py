"""Keys and values of conversations, kept from one turn to the next.

A conversation that goes on begins as it did before: what the model has read of it, its own answers included,
it need not read again. As many tokens are reused as are the same from the beginning, since a chat template
may write earlier messages anew, and since an answer's text may have other tokens than were generated.

What is kept is a function of the conversations and of the size of batches: never of time or of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpies.engines.base import Engine
from mpies.engines.cache import RoomyLayer

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
Owner = tuple[int, int]
"""A member's number in its block, and a conversation's."""


@dataclass
class Part:
    """What is in the cache of a batch's rows when they leave it."""

    rows: list[int]
    """Their numbers among the batch's prompts."""
    starts: list[int]
    """The columns in which their tokens begin."""
    layers: list[KeysAndValues | None]
    """(rows, heads, columns, size); None once they have been taken."""

    @classmethod
    def of(
        cls, layers: Sequence[RoomyLayer], rows: list[int], starts: list[int], which: Sequence[int]
    ) -> Part:
        """Of those that are number `which` of all rows of the layers."""
        if len(which) == len(rows):
            return cls(rows, starts, [(layer.keys, layer.values) for layer in layers])
        chosen = torch.tensor(which, device=layers[0].keys.device)
        copies: list[KeysAndValues | None] = [(layer.keys[chosen], layer.values[chosen]) for layer in layers]
        return cls([rows[i] for i in which], [starts[i] for i in which], copies)


@dataclass(frozen=True)
class Past:
    """What is kept of a conversation, and how many of its tokens, from the beginning, are the same now."""

    part: Part
    place: int
    """Of its row in the part."""
    tokens: int

    def layer(self, number: int, tokens: int) -> KeysAndValues:
        """Of so many tokens, up to `self.tokens`: (heads, tokens, size) each."""
        kept, start = self.part.layers[number], self.part.starts[self.place]
        assert kept is not None, "what is kept is given out once"
        keys, values = (states[self.place, :, start : start + tokens] for states in kept)
        return keys, values


@dataclass(frozen=True)
class _Read:
    """A conversation's tokens that were read, and where its row is."""

    tokens: list[int]
    part: Part
    place: int


class KeptTurns:
    """What an engine keeps of the conversations of a block while they are played: of one batch at most.

    `version` tells one state of what the model computes from all others, as `Weights.version` does: what was
    kept in another is never given out.
    """

    def __init__(self, version: Callable[[], int]):
        self._version = version
        self._read: dict[Owner, _Read] = {}
        self._of = version()

    def recall(self, owners: Sequence[Owner], prompts: Sequence[list[int]]) -> list[Past | None]:
        """Of each conversation, what its prompt goes on from, if that is half of it; all is forgotten here.

        A row with more that is new would have the others of its batch wait.
        """
        read, self._read = self._read, {}
        now = self._version()
        if self._of != now:
            read, self._of = {}, now
        found = (read.get(owner) for owner in owners)
        return [_past(one, prompt) if one else None for one, prompt in zip(found, prompts, strict=True)]

    def keep(
        self,
        owners: Sequence[Owner],
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        parts: Sequence[Part],
    ) -> None:
        """From the batch of these conversations, which were recalled before it was computed.

        An answer's last token is never kept: whether it was read depends on the batch.
        """
        for part in parts:
            for place, row in enumerate(part.rows):
                tokens = [*prompts[row], *answers[row][:-1]]
                self._read[owners[row]] = _Read(tokens, part, place)


def _past(read: _Read, prompt: list[int]) -> Past | None:
    """At least one token is new: logits are its."""
    most = min(len(read.tokens), len(prompt) - 1)
    same = next((i for i in range(most) if read.tokens[i] != prompt[i]), most)
    return Past(read.part, read.place, same) if 2 * same >= len(prompt) else None


def resume(layers: Sequence[RoomyLayer], pasts: Sequence[Past], tokens: Sequence[int], seen: int) -> None:
    """The layers hold so many of each row's tokens, up to column `seen`: they are taken, layer by layer."""
    for number, layer in enumerate(layers):
        layer.resume([past.layer(number, some) for past, some in zip(pasts, tokens, strict=True)], seen)
        for past in pasts:
            past.part.layers[number] = None


def tell(engine: Engine) -> str:
    """What it does from turn to turn, in words; after its test."""
    if engine.keeps:
        return "keys and values are kept from one to the next"
    return "each reads its conversation anew"
