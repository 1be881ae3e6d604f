"""sigma and alpha over the generations: constant as in the paper, or with warm-up and decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpies import config


@dataclass(frozen=True)
class Step:
    """What a generation perturbs and updates with; the run file keeps it with the generation."""

    sigma: float
    alpha: float
    anchor_decay: float = 0.0


def step(es: config.EsSettings, generation: int) -> Step:
    """The values of a generation, of which the first is 0: a pure function of both.

    They are rounded to 12 digits, so that ranks with different mathematical libraries agree.
    """
    sigma = multiplier(es.sigma_schedule, es.sigma_warmup, es.sigma_end, generation, es.generations)
    alpha = multiplier(es.alpha_schedule, es.alpha_warmup, es.alpha_end, generation, es.generations)
    return Step(_rounded(es.sigma, sigma), _rounded(es.alpha, alpha), es.anchor_decay)


def multiplier(schedule: str, warmup: int, end: float, generation: int, generations: int) -> float:
    """What the setting is multiplied with, from 0 to 1, or to `end` if that is larger.

    It rises linearly to 1 in the first `warmup` generations, then stays there (constant) or goes to
    `end`, which the last generation has: on a line, or on half a cosine wave.
    """
    if generation < warmup:
        return (generation + 1) / warmup
    done = min(1.0, (generation - warmup) / max(1, generations - 1 - warmup))
    if schedule == "linear":
        return 1 + (end - 1) * done
    if schedule == "cosine":
        return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2
    return 1.0


def _rounded(setting: float, multiplier: float) -> float:
    return setting if multiplier == 1 else float(f"{setting * multiplier:.12g}")
