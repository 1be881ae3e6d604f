"""Decoding with a transformers causal model: a prefill, then a token a step for all rows.

What `generate` of transformers does for this case, without what a population does not need: the
cache's room is allocated once instead of copied at every token, rows that have ended leave the batch,
and a batch without padding carries no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from mpies.engines.reading import Reading
from mpies.engines.turns import Part, Past
from mpies.engines.vision import Inputs

# choose(logits (rows, vocabulary), rows int64 (rows,), place) -> tokens int64 (rows,): the token at that
# place of the answers, from 0; `rows` says which prompts are still answered.
Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

# Ended rows leave once they are this share of the batch: taking them out copies the cache.
LEAVING = 1 / 8


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
    inputs: Sequence[Inputs] = (),
    pasts: Sequence[Past | None] = (),
    parts: list[Part] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, at most `limit`, up to and including its first stop token.

    `inputs`: what the model is given of each prompt's images, if there are any. `pasts`: what is kept of it,
    see `Reading`. `parts`: gets what the cache has of all rows as they leave, all but their last tokens.

    `on_rows` is called before the prompts that a forward pass is made of change, with their numbers,
    int64 (rows,).
    """
    reading = Reading(model, prompts, limit, inputs, on_rows, pasts)
    device, rows = model.device, reading.rows
    ends = torch.tensor(sorted(stops), dtype=torch.int64, device=device)
    new = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    logits = reading.begin()
    for made in range(limit):
        token = choose(logits[:, -1], rows, made)
        new[rows, made] = token
        running &= ~torch.isin(token, ends)
        ended = len(running) - int(running.sum())
        if ended == len(running) or made == limit - 1:
            break
        if ended >= LEAVING * len(running):
            staying = running.nonzero()[:, 0]
            if parts is not None:
                parts.append(reading.part((~running).nonzero()[:, 0]))
            token, running = token[staying], running[staying]
            reading.leave(staying)
            rows = reading.rows
        logits = reading.go_on(token[:, None])
    if parts is not None:
        parts.append(reading.part(torch.arange(len(rows))))
    return [_until_stop(row, stops) for row in new.tolist()]


def _until_stop(row: list[int], stops: set[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]
