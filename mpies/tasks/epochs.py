"""Which training prompts a generation uses: a pure function of seed and generation."""

from __future__ import annotations

import numpy as np

from mpies.noise.definition import STREAM_PROMPTS, philox


def sample(seed: int, generation: int, total: int, size: int) -> np.ndarray:
    """Indices of `size` out of `total` prompts, int64 (size,), all different.

    An epoch is total // size generations, in which no prompt is used twice; the rest sit that epoch
    out. Its order sorts the prompts by the first 64 bits of Philox(key=seed; counter=(prompt, epoch,
    stream 4)).
    """
    epoch, turn = divmod(generation, total // size)
    words = philox(seed, np.arange(total), epoch, STREAM_PROMPTS)
    keys = words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)
    order = np.argsort(keys, kind="stable")
    return order[turn * size : (turn + 1) * size]
