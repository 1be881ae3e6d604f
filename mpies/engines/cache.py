"""The cache of a model that decodes: its own kind, with room for all tokens from the start."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, (rows, heads, tokens, size), in memory that has room for `room` tokens.

    Where the model reads a window only, `sliding`, its masks see to that: nothing is forgotten here.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int, sliding: bool):
        super().__init__()
        self.room = room
        self.is_sliding = sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._keys, self._values = (
            states.new_empty(*states.shape[:2], self.room, states.shape[3])
            for states in (key_states, value_states)
        )
        self._show(0)

    def update(self, key_states, value_states, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        tokens = self.keys.shape[-2]
        self._keys, self._values = self._keys[beam_idx], self._values[beam_idx]
        self._show(tokens)

    def join(self, parts: list[RoomyLayer]) -> None:
        """Hold what copies of this layer hold, each of which has had some of the rows, in this order."""
        if not self.is_initialized:
            vars(self).update(vars(parts[0]))
            self._keys = torch.cat([part._keys for part in parts])
            self._values = torch.cat([part._values for part in parts])
        self._show(parts[0].keys.shape[-2])

    def take(self, parts: Sequence[Any], order: torch.Tensor, width: int) -> None:
        """Hold what other layers do, each of some rows, `order` by number, that end in column `width`."""
        first = parts[0]
        self.lazy_initialization(
            *(states.new_empty(len(order), *states.shape[1:]) for states in (first.keys, first.values))
        )
        done = 0
        for part in parts:
            rows, start = order[done : done + len(part.keys)], width - part.keys.shape[-2]
            done += len(rows)
            for mine, theirs in ((self._keys, part.keys), (self._values, part.values)):
                mine[rows, :, :start] = 0  # is masked, but would be none if it were not a number
                mine[rows, :, start:width] = theirs
        self._show(width)

    def resume(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], seen: int) -> None:
        """Hold each row's piece, keys and values (heads, tokens, size), which ends in column `seen`."""
        self.lazy_initialization(
            *(one.new_empty(len(pieces), one.shape[0], 0, one.shape[2]) for one in pieces[0])
        )
        padding = seen - min(keys.shape[1] for keys, _ in pieces)
        for mine, kept in zip((self._keys, self._values), zip(*pieces, strict=True), strict=True):
            mine[:, :, :padding].zero_()  # as in `take`; all rows at once, which a GPU has one launch for
            for row, piece in enumerate(kept):
                mine[row, :, seen - piece.shape[1] : seen] = piece
        self._show(seen)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self._keys[:, :, :tokens], self._values[:, :, :tokens]


def keeps_all(cache: DynamicCache) -> bool:
    """Does it hold the keys and values of all tokens, and nothing else? States cannot be cut back."""
    return bool(cache.layers) and all(isinstance(layer, RoomyLayer) for layer in cache.layers)


# What models call it: transformers from 5.24 on; before, and before those of states alone, as Mamba.
ARGUMENTS = ("cache", "past_key_values", "cache_params")


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name of the cache among the arguments of a model's forward; None if it takes none."""
    knows = inspect.signature(model.forward).parameters
    return next((name for name in ARGUMENTS if name in knows), None)


def has_keys(argument: str, cache: DynamicCache) -> bool:
    """Does a model that calls its cache so attend to keys, and not only go on from states?"""
    if argument == "cache":
        return any(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return argument == "past_key_values"


def cache_for(model: PreTrainedModel, room: int) -> DynamicCache:
    """The model's own kind of cache, with its plain attention layers replaced by roomy ones.

    Those with a window as well: transformers believes in any `sliding_window` of a config.json, and for
    models that do not read it, it would drop keys that they look at.
    """
    cache = DynamicCache(config=model.config)
    windows = [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers]
    cache.layers = [
        RoomyLayer(room, window) if window or type(layer) is DynamicLayer else layer
        for layer, window in zip(cache.layers, windows, strict=True)
    ]
    return cache
