"""How likely given answers are: log-probabilities of their tokens, by forward passes over whole answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.reading import OnRows, Reading
from mpies.engines.vision import Inputs

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
    inputs: Sequence[Inputs] = (),
    on_rows: OnRows = lambda rows: None,
) -> list[np.ndarray]:
    """log softmax(logits / temperature) of each answer's tokens: nat, float64 (tokens of the answer,).

    The answers are read in pieces, each continuing the cache of the pieces before, so that memory does
    not grow with their length times the vocabulary; or with their prompts, `at_once`, but for prompts with
    images (`inputs`), which are read before their answers in any case. `on_rows`: see Reading.
    """
    device, length = model.device, max(map(len, answers))
    if length == 0:
        return [np.zeros(0) for _ in answers]
    reading = Reading(model, prompts, length, inputs, on_rows)
    # Right padded: no token sees what comes after it, and what the padding gets is thrown away.
    told = torch.tensor([[*answer, *[0] * (length - len(answer))] for answer in answers], device=device)
    found = []
    for logits in _pieces(reading, told, at_once):
        chances = torch.log_softmax(logits.float() / temperature, dim=-1)
        last = reading.seen - reading.width + 1
        following = told[:, last - logits.shape[1] : last]
        found.append(chances.gather(-1, following[..., None])[..., 0].double())
    values = torch.cat(found, dim=1).cpu().numpy()
    return [row[: len(answer)] for row, answer in zip(values, answers, strict=True)]


def _pieces(reading: Reading, told: torch.Tensor, at_once: bool) -> Iterator[torch.Tensor]:
    """Logits of the tokens that the answers' tokens follow, (rows, tokens, vocabulary): of some at a time.

    The answers' last tokens are followed by none.
    """
    rows, length = told.shape
    if at_once and not reading.inputs:
        reading.on_rows(reading.rows)
        ids = torch.cat([reading.ids, told[:, : length - 1]], dim=1)
        yield reading.go_on(ids, length)[:, -length:]
        return
    yield reading.begin()[:, -1:]
    if length > 1:
        most = max(1, LOGITS // (rows * reading.model.config.get_text_config().vocab_size))
        for piece in told[:, : length - 1].split(most, dim=1):
            yield reading.go_on(piece, piece.shape[1])[:, -piece.shape[1] :]
