"""The factors of low-rank noise as an update needs them: the same for every kernel set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpies.noise.definition import STREAM_A, STREAM_B
from mpies.noise.uploads import uploaded

if TYPE_CHECKING:
    from mpies.noise import Kernels

# Numbers of a panel of factors: 32 MB. A thousand directions' factors are larger than their matrix.
PANEL = 2**23
LEAST = 64  # rows or columns of a panel


@dataclass(frozen=True)
class Tile:
    """A part of a matrix, and the factors of its noise: float32, contiguous, on the matrix's device."""

    row: int
    column: int
    """The tile's first row and column in the matrix."""
    a: torch.Tensor
    """(D rank, tile's rows), times float32(coefficient / sqrt(rank))."""
    b: torch.Tensor
    """(D rank, tile's columns)."""


def scaled_factors(
    kernels: Kernels,
    base: torch.Tensor,
    seeds: Sequence[int],
    coefficients: np.ndarray,
    parameter: int,
    rank: int,
    matrix: int = 0,
) -> Iterator[Tile]:
    """The tiles of a matrix `base` (rows, columns), one after another; see `definition.lowrank_updated`.

    A tile has the factors of all directions, so that each of its elements can be summed at once.
    """
    rows, columns = base.shape
    scales = (np.asarray(coefficients, np.float64) / math.sqrt(rank)).astype(np.float32)
    scale = uploaded(scales, base.device)[:, None, None]
    most = max(LEAST, PANEL // max(1, len(seeds) * rank))

    def draw(stream: int, length: int, first: int) -> torch.Tensor:
        """(D, rank, up to `most`): part of the vectors of `length` of which each direction has `rank`."""
        count = min(most, length - first)
        starts = [(matrix * rank + k) * length + first for k in range(rank)]
        return torch.stack(
            [kernels.normal(count, seeds, parameter, stream, base.device, start) for start in starts], dim=1
        )

    for column in range(0, columns, most):
        b = draw(STREAM_B, columns, column).flatten(0, 1)
        for row in range(0, rows, most):
            a = draw(STREAM_A, rows, row).mul_(scale).flatten(0, 1)
            yield Tile(row, column, a, b)
