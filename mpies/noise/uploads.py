"""Small arrays that kernels read, on their device. An upload waits for the device: each is made once."""

from __future__ import annotations

import functools

import numpy as np
import torch

from mpies.noise import definition


@functools.lru_cache
def table(device: torch.device) -> torch.Tensor:
    """The definition's table on a device: float32 (8192,)."""
    return torch.from_numpy(definition.TABLE.copy()).to(device)


def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on the device with the array's values, not to be written to.

    An update asks for the same seeds and factors for every parameter: the last few are kept.
    """
    return _uploaded(array.tobytes(), array.dtype.str, array.shape, torch.device(device))


@functools.lru_cache(maxsize=16)
def _uploaded(raw: bytes, dtype: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype).reshape(shape).copy()).to(device)
