"""What ranks tell one another in a generation: (seed, reward) pairs; then digests and whether to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpies.es.population import Member

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])
WORDS = np.dtype([("digest", "<u8"), ("stop", "<i8")])


@dataclass
class Evaluated:
    """A member after its evaluation."""

    member: Member
    reward: float
    tokens: int
    seconds: float
