"""The factors of low-rank noise as an update needs them: the same for every kernel set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpies.noise.definition import STREAM_A, STREAM_B
from mpies.noise.uploads import uploaded

if TYPE_CHECKING:
    from mpies.noise import Kernels


def scaled_factors(
    kernels: Kernels,
    base: torch.Tensor,
    seeds: Sequence[int],
    coefficients: np.ndarray,
    parameter: int,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (D rank, rows), times float32(coefficient / sqrt(rank)), and B (D rank, columns); float32.

    Of a matrix `base` (rows, columns), on its device; see `definition.lowrank_updated`.
    """
    rows, columns = base.shape
    a = kernels.normal(rank * rows, seeds, parameter, STREAM_A, base.device)
    b = kernels.normal(rank * columns, seeds, parameter, STREAM_B, base.device)
    scales = (np.asarray(coefficients, np.float64) / math.sqrt(rank)).astype(np.float32)
    a *= uploaded(scales, base.device)[:, None]
    return a.view(-1, rows), b.view(-1, columns)
