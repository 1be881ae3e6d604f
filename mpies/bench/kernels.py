"""The kernels, per parameter, against a plain copy of the same bytes and the paper's way."""

from __future__ import annotations

import numpy as np
import torch

from mpies.bench import paper
from mpies.bench.timing import Case, Timings, in_turns
from mpies.noise import Kernels
from mpies.noise.definition import STREAM_NOISE

DIRECTIONS = 30


def measure(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, size: int, repeats: int, synchronize, say
) -> Timings:
    """Seconds per parameter (updates: and per direction) on one tensor of `size` parameters."""
    base = torch.randn(size, device=device).mul_(0.02)
    live = torch.empty(size, dtype=dtype, device=device)
    # Of the bytes that a perturbation moves, half are read and half written.
    half = torch.zeros(size * (4 + live.element_size()) // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    small = live[: size // 8]  # the paper's way is slow, and not bound by memory
    seeds = np.arange(DIRECTIONS, dtype=np.uint64)
    factors = np.full(DIRECTIONS, 1e-6, np.float32)
    few = [1, 2, 3]
    slow, some = small.numel(), len(few)
    cases = {
        "copy": Case(lambda: other.copy_(half), size),
        "noise": Case(lambda: kernels.normal(size, [7], 1, STREAM_NOISE, device), size),
        "perturb": Case(lambda: kernels.perturb(base, live, 7, 1, 0.01), size),
        "update": Case(lambda: kernels.update(base, seeds, factors, 1), size * DIRECTIONS),
        "digest": Case(lambda: kernels.digest(base, 1), size),
        "paper: perturb + restore": Case(lambda: paper.perturb_and_restore([small], 7, 0.01), slow),
        "paper: update": Case(lambda: paper.update([small], few, [1e-6] * some), slow * some),
    }
    return in_turns(cases, repeats, synchronize, say)
