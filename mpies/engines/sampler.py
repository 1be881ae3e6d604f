"""Sampling tokens with counter-based random numbers.

An answer's token at a place is chosen by one uniform number, a pure function of (seed, number of the
answer, place): Philox4x32-10 with key = seed and counter = (number's low half, high half, place, stream
6). So an answer does not depend on which others are made with it, except through its logits' last bits.
"""

from __future__ import annotations

import numpy as np
import torch

from mpies.engines.base import Draws
from mpies.noise.definition import STREAM_ANSWERS, philox

# Probabilities are counted in units of 2^-40, so that their sums are whole numbers: exact, whatever
# the order in which a device adds them.
UNITS = 2.0**40


def uniform(seed: int, numbers: np.ndarray, place: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), multiples of 2^-52: float64 (answers,) for numbers uint64 (answers,).

    `place`: of the token in its answer, from 0; of all answers, or of each.
    """
    words = philox(seed, numbers, place, STREAM_ANSWERS).astype(np.uint64)
    return ((words[0] | words[1] << np.uint64(32)) >> np.uint64(12)) * 2.0**-52


def answer_numbers(prompts: np.ndarray, samples: int) -> np.ndarray:
    """prompt * 2^32 + sample for every prompt's samples, one prompt after another: uint64 (P samples,)."""
    prompts = np.asarray(prompts, dtype=np.uint64) << np.uint64(32)
    return (prompts[:, None] + np.arange(samples, dtype=np.uint64)).ravel()


class Sampler:
    """Chooses tokens with probability softmax(logits / temperature), by inverting their cumulative sum."""

    def __init__(self, draws: Draws):
        self.draws = draws

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, place: int | np.ndarray) -> torch.Tensor:
        """logits (rows, vocabulary) of the answers `rows` (rows,) -> tokens int64 (rows,)."""
        chances = torch.softmax(logits.float() / self.draws.temperature, dim=-1)
        sums = (chances * UNITS).round_().to(torch.int64).cumsum(dim=-1)
        which = rows.cpu().numpy()
        u = uniform(self.draws.seed, self.draws.numbers[which], self.draws.places(which, place))
        # Below the whole sum always, since u is 1 - 2^-52 at most.
        target = (torch.from_numpy(u).to(logits.device)[:, None] * sums[:, -1:]).long()
        return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
