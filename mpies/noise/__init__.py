"""Noise: standard normal numbers that are a pure function of (seed, parameter, index).

`definition` says in plain NumPy what the numbers are. `cpu` (numba), `gpu` (Triton, for CUDA and ROCm)
and `device` (torch integer operations, wherever torch runs) are the kernels that the program runs; all
give the definition's bits, for any number of threads and any slicing of a tensor. A kernel set has
these verbs, on flat tensors:

    perturb(base, live, seed, parameter, scale)      live <- cast(base + scale * noise)
    update(base, seeds, coefficients, parameter)     base <- base + sum_i coefficients_i * noise_i
    digest(base, parameter)                          64 bits of the base's bits and positions, int64 ()
    round(value, base, seed, parameter)              base <- value, rounded to bfloat16 at random
    normal(count, seeds, parameter, stream, device)  a stream's numbers, per seed
    lowrank_update(base, seeds, coefficients, ...)   the update of a matrix with noise of low rank
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


# What torch calls the GPUs that Triton compiles for: NVIDIA's, and AMD's too.
TRITON_KNOWS = {"cuda"}


class Kernels(Protocol):
    """What `Weights` needs from a device. `start` is the index of the first element given."""

    def perturb(
        self,
        base: torch.Tensor,
        live: torch.Tensor,
        seed: int,
        parameter: int,
        scale: float,
        start: int = 0,
    ) -> None: ...

    def update(
        self,
        base: torch.Tensor,
        seeds: np.ndarray,
        coefficients: np.ndarray,
        parameter: int,
        start: int = 0,
    ) -> None: ...

    def normal(
        self,
        count: int,
        seeds: Sequence[int],
        parameter: int,
        stream: int,
        device: torch.device,
        start: int = 0,
    ) -> torch.Tensor: ...

    def lowrank_update(
        self,
        base: torch.Tensor,
        seeds: np.ndarray,
        coefficients: np.ndarray,
        parameter: int,
        rank: int,
        matrix: int = 0,
    ) -> None: ...

    def digest(self, base: torch.Tensor, parameter: int, start: int = 0) -> torch.Tensor: ...

    def round(
        self, value: torch.Tensor, base: torch.Tensor, seed: int, parameter: int, start: int = 0
    ) -> None: ...


def kernels_for(device: torch.device, threads: int) -> Kernels:
    """The kernel set for a device; `threads` matters on the CPU only and never changes a bit."""
    if device.type == "cpu":
        from mpies.noise.cpu import CpuKernels

        return CpuKernels(threads)
    if device.type in TRITON_KNOWS and find_spec("triton"):
        from mpies.noise.gpu import GpuKernels

        return GpuKernels()
    from mpies.noise.device import DeviceKernels

    return DeviceKernels()
