"""A kernel set tried against the definition, before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpies.noise import definition

if TYPE_CHECKING:
    from mpies.noise import Kernels

SIZE, SHAPE, RANK = 2 * definition.CHUNK + 77, (29, 31), 2
SEEDS = np.array([3, 2**64 - 5], np.uint64)
FACTORS = np.array([0.1, -1 / 3], np.float32)
PARAMETER, SCALE = 2**32 - 7, 0.0123
# The rounding to half of their bits is each device's own.
DTYPES = torch.float32, torch.bfloat16, torch.float16


def find_wrong(kernels: Kernels, device: torch.device) -> str | None:
    """The first verb of the kernel set that has not the definition's bits on the device; None if all have.

    On a GPU, this compiles the kernels. Raises whatever comes of that.
    """
    for verb, found, expected in _attempts(kernels, device):
        if not torch.equal(found.cpu(), expected):
            return verb
    return None


def _attempts(kernels: Kernels, device: torch.device) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(verb, what it makes, what the definition makes), in float32 or integers."""
    base, seed = definition.normal(1, 1, 0, SIZE), int(SEEDS[1])
    given = torch.from_numpy(base).to(device)
    for dtype in DTYPES:
        live = torch.empty(SIZE, dtype=dtype, device=device)
        kernels.perturb(given, live, seed, PARAMETER, SCALE)
        yield "perturb", live, torch.from_numpy(definition.perturbed(base, seed, PARAMETER, SCALE)).to(dtype)

    def changed(verb: Callable[..., None], values: np.ndarray, *arguments: object) -> torch.Tensor:
        tensor = torch.from_numpy(values.copy()).to(device)
        verb(tensor, *arguments)
        return tensor

    updated = definition.updated(base, SEEDS, FACTORS, PARAMETER)
    yield "update", changed(kernels.update, base, SEEDS, FACTORS, PARAMETER), torch.from_numpy(updated)
    matrix = base[: SHAPE[0] * SHAPE[1]].reshape(SHAPE)
    for number in (0, 3):  # of a stack of matrices
        expected = definition.lowrank_updated(matrix, SEEDS, FACTORS, PARAMETER, RANK, number)
        found = changed(kernels.lowrank_update, matrix, SEEDS, FACTORS, PARAMETER, RANK, number)
        yield "lowrank_update", found, torch.from_numpy(expected)
    total = np.array(definition.digest(base, PARAMETER), np.uint64).view(np.int64)
    yield "digest", kernels.digest(given, PARAMETER), torch.from_numpy(total)
    rounded = torch.empty(SIZE, dtype=torch.bfloat16, device=device)
    kernels.round(given, rounded, seed, PARAMETER)
    bits = definition.rounded(base, seed, PARAMETER).view(np.int16)
    yield "round", rounded.view(torch.int16), torch.from_numpy(bits)
