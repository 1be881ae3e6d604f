"""Decoding with a transformers causal model: a prefill, then a token a step for all rows.

What `generate` of transformers does for this case, without what a population does not need: the
cache's room is allocated once instead of copied at every token, rows that have ended leave the batch,
and a batch without padding carries no mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# choose(logits (rows, vocabulary), rows int64 (rows,), place) -> tokens int64 (rows,): the token at that
# place of the answers, from 0; `rows` says which prompts are still answered.
Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

# Ended rows leave once they are this share of the batch: taking them out copies the cache.
LEAVING = 1 / 8


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

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self._keys[:, :, :tokens], self._values[:, :, :tokens]


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


def greedy(logits: torch.Tensor, rows: torch.Tensor, place: int) -> torch.Tensor:
    """The likeliest token of each row."""
    return logits.max(dim=-1).indices  # argmax takes five times as long on a CPU


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stops: set[int],
    limit: int,
    on_rows: Callable[[torch.Tensor], None],
    choose: Choose = greedy,
) -> list[list[int]]:
    """The new tokens of each prompt, at most `limit`, up to and including its first stop token.

    `on_rows` is called before the prompts that a forward pass is made of change, with their numbers,
    int64 (rows,).
    """
    device = model.device
    ids, starts = left_padded(prompts, device)
    width = ids.shape[1]
    ends = torch.tensor(sorted(stops), dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts), device=device)
    padded = any(len(prompt) < width for prompt in prompts)
    positions = torch.arange(width + limit, device=device)
    cache = cache_for(model, width + limit)
    knows = inspect.signature(model.forward).parameters

    new = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    on_rows(rows)
    for made in range(limit):
        seen = positions[: width + made]
        mask = (seen >= starts[:, None]).long() if padded else None
        places = (seen[-ids.shape[1] :] - starts[:, None]).clamp(min=0)
        logits = forward(model, knows, cache, ids, mask, places)
        token = choose(logits[:, -1], rows, made)
        new[rows, made] = token
        running &= ~torch.isin(token, ends)
        ended = len(running) - int(running.sum())
        if ended == len(running):
            break
        if ended >= LEAVING * len(running):
            staying = running.nonzero()[:, 0]
            rows, starts, token, running = (x[staying] for x in (rows, starts, token, running))
            cache.reorder_cache(staying)  # type: ignore[arg-type]  # its numbers are int64
            on_rows(rows)
        ids = token[:, None]
    return [_until_stop(row, stops) for row in new.tolist()]


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, width), and where each row starts (rows,); int64.

    Left padded, so that all rows' next tokens are in one column; what is padded with is to be masked.
    """
    width = max(map(len, prompts))
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    return torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device), starts


def forward(model, knows, cache, ids, mask, places, keep: int = 1) -> torch.Tensor:
    """Logits of the last `keep` tokens: (rows, `keep` or more, vocabulary).

    `knows`: what the model's forward takes.
    """
    optional = {"position_ids": places, "logits_to_keep": keep}
    given = {name: value for name, value in optional.items() if name in knows}
    return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given).logits


def _until_stop(row: list[int], stops: set[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]
