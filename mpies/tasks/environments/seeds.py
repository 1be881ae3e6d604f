"""What an episode's environment draws from: a pure function of the run's seed, generation and row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpies.noise.definition import STREAM_ENVIRONMENTS, philox

# Instead of a generation: an evaluation's episodes are the same at all of them.
EVALUATION = 0


def seeds(seed: int, numbers: Sequence[int], generation: int | None) -> list[int]:
    """The seeds of the rows with these numbers, from 0 to 2^32 - 1; generation None: of an evaluation.

    The first word of Philox(key = seed; counter = (row, generation + 1, stream 8)): 32 bits, which every
    generator takes as its seed. All members of a generation have the same.
    """
    when = EVALUATION if generation is None else generation + 1
    words = philox(seed, np.array(numbers, dtype=np.uint64), when, STREAM_ENVIRONMENTS)
    return [int(word) for word in words[0]]
