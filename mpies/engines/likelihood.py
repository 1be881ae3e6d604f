"""How likely given answers are: log-probabilities of their tokens, by forward passes over whole answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.decode import cache_for, forward, left_padded

# Logits of this many (tokens x vocabulary) at a time. A whole answer of 1000 tokens in a vocabulary of
# 150,000 would take 0.6 GB in float32, a batch of 32 such 20 GB.
LOGITS = 2**25


@torch.inference_mode()
def of(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    temperature: float = 1.0,
    at_once: bool = False,
) -> list[np.ndarray]:
    """log softmax(logits / temperature) of each answer's tokens: nat, float64 (tokens of the answer,).

    The answers are read in pieces, each continuing the cache of the pieces before, so that memory does
    not grow with their length times the vocabulary; or with their prompts, `at_once`.
    """
    device, length = model.device, max(map(len, answers))
    if length == 0:
        return [np.zeros(0) for _ in answers]
    prefix, starts = left_padded(prompts, device)
    # Right padded: no token sees what comes after it, and what the padding gets is thrown away.
    told = torch.tensor([[*answer, *[0] * (length - len(answer))] for answer in answers], device=device)
    width, knows = prefix.shape[1], inspect.signature(model.forward).parameters
    padded = any(len(prompt) < width for prompt in prompts)
    cache = cache_for(model, width + length)
    positions = torch.arange(width + length, device=device)
    read, found = 0, []
    for ids, keep in _pieces(model, prefix, told, at_once):
        read += ids.shape[1]
        mask = (positions[:read] >= starts[:, None]).long() if padded else None
        places = (positions[read - ids.shape[1] : read] - starts[:, None]).clamp(min=0)
        logits = forward(model, knows, cache, ids, mask, places, keep)[:, -keep:]
        chances = torch.log_softmax(logits.float() / temperature, dim=-1)
        following = told[:, read - width - keep + 1 : read - width + 1]
        found.append(chances.gather(-1, following[..., None])[..., 0].double())
    values = torch.cat(found, dim=1).cpu().numpy()
    return [row[: len(answer)] for row, answer in zip(values, answers, strict=True)]


def _pieces(
    model: PreTrainedModel, prompts: torch.Tensor, told: torch.Tensor, at_once: bool
) -> Iterator[tuple[torch.Tensor, int]]:
    """What is read at a time, and how many of its last tokens tell probabilities: of those that follow.

    The answers' last tokens are followed by none.
    """
    rows, length = told.shape
    if at_once:
        yield torch.cat([prompts, told[:, : length - 1]], dim=1), length
        return
    yield prompts, 1
    if length > 1:
        most = max(1, LOGITS // (rows * model.config.get_text_config().vocab_size))
        yield from ((piece, piece.shape[1]) for piece in told[:, : length - 1].split(most, dim=1))
