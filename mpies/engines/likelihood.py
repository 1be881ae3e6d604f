"""How likely given answers are: log-probabilities of their tokens, by forward passes over whole answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mpies.engines.decode import cache_for, forward, left_padded

# Logits of this many (tokens x vocabulary) at a time. A whole answer of 1000 tokens in a vocabulary of
# 150,000 would take 0.6 GB in float32, a batch of 32 such 20 GB.
LOGITS = 2**25


@torch.inference_mode()
def of(
    model: nn.Module,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """log softmax(logits / temperature) of each answer's tokens: nat, float64 (tokens of the answer,).

    The answers are read in pieces, each continuing the cache of the pieces before, so that memory does
    not grow with their length times the vocabulary.
    """
    device, length = model.device, max(map(len, answers))
    if length == 0:
        return [np.zeros(0) for _ in answers]
    ids, starts = left_padded(prompts, device)
    # Right padded: no token sees what comes after it, and what the padding gets is thrown away.
    told = torch.tensor([[*answer, *[0] * (length - len(answer))] for answer in answers], device=device)
    width, knows = ids.shape[1], inspect.signature(model.forward).parameters
    cache = cache_for(model, width + length)
    positions = torch.arange(width + length, device=device)
    piece = max(1, LOGITS // (len(prompts) * model.config.get_text_config().vocab_size))
    # The prompts tell the first token's probability, every piece those of the tokens that follow.
    pieces = [ids, *told[:, : length - 1].split(piece, dim=1)] if length > 1 else [ids]
    read, found = 0, []
    for number, ids in enumerate(pieces):
        read += ids.shape[1]
        keep = ids.shape[1] if number else 1
        mask = (positions[:read] >= starts[:, None]).long() if starts.any() else None
        places = (positions[read - ids.shape[1] : read] - starts[:, None]).clamp(min=0)
        logits = forward(model, knows, cache, ids, mask, places, keep)[:, -keep:]
        chances = torch.log_softmax(logits.float() / temperature, dim=-1)
        following = told[:, read - width - keep + 1 : read - width + 1]
        found.append(chances.gather(-1, following[..., None])[..., 0].double())
    values = torch.cat(found, dim=1).cpu().numpy()
    return [row[: len(answer)] for row, answer in zip(values, answers, strict=True)]
