"""Noise on any torch device: plain integer operations with the bits of `definition`. Slow: see `gpu`.

torch has no unsigned 32-bit arithmetic, so words travel in int64, whose products wrap modulo 2^64 as
Philox needs. A tensor is worked through in slices of `SLICE` elements, which bounds the scratch memory.
Multiplications and additions are separate operations: `torch.add(..., alpha=...)` would fuse them.
"""

from __future__ import annotations

import numpy as np
import torch

from mpies.noise import definition
from mpies.noise.definition import CHUNK, LANES, round_keys
from mpies.noise.factors import scaled_factors
from mpies.noise.uploads import table

LOW = 0xFFFFFFFF
SLICE = 2**22


def _high(product: torch.Tensor) -> torch.Tensor:
    return (product >> 32) & LOW


def integers(
    seed: int, parameter: int, start: int, count: int, device: torch.device, stream: int
) -> torch.Tensor:
    """`definition.integers`, as int64, on `device`."""
    first, last = start // CHUNK, -(-(start + count) // CHUNK)
    block = torch.arange(first * LANES, last * LANES, dtype=torch.int64, device=device)
    c0, c1 = block & LOW, _high(block)
    c2 = torch.full_like(block, parameter)
    c3 = torch.full_like(block, stream)
    m0, m1 = definition.PHILOX_MULTIPLIERS
    for k0, k1 in round_keys(seed).tolist():
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & LOW, _high(p0) ^ c3 ^ k1, p0 & LOW
    words = torch.stack([c0, c1, c2, c3]).view(4, -1, LANES)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    offset = start - first * CHUNK
    return halves.permute(1, 0, 2, 3).reshape(-1)[offset : offset + count]


def normal(
    seed: int,
    parameter: int,
    start: int,
    count: int,
    device: torch.device,
    stream: int = definition.STREAM_NOISE,
) -> torch.Tensor:
    """Elements [start, start + count) of a parameter's noise: float32, on `device`."""
    index = integers(seed, parameter, start, count, device, stream) >> (16 - definition.TABLE_BITS)
    return table(device)[index]


def _slices(size: int):
    for a in range(0, size, SLICE):
        yield a, min(a + SLICE, size)


class DeviceKernels:
    """The kernel set for tensors on any torch device."""

    def perturb(self, base, live, seed, parameter, scale, start=0):
        """live <- cast(base + scale * noise). Flat contiguous tensors; base float32, live any float."""
        scale = float(np.float32(scale))
        for a, b in _slices(base.numel()):
            noise = normal(seed, parameter, start + a, b - a, base.device)
            live[a:b].copy_(noise.mul_(scale).add_(base[a:b]))

    def update(self, base, seeds, coefficients, parameter, start=0):
        """base += sum_i coefficients_i * noise(seeds_i), summed in float32 in the order given."""
        for a, b in _slices(base.numel()):
            total = torch.zeros(b - a, dtype=torch.float32, device=base.device)
            for seed, coefficient in zip(seeds, np.asarray(coefficients, np.float32), strict=True):
                noise = normal(int(seed), parameter, start + a, b - a, base.device)
                total.add_(noise.mul_(float(coefficient)))
            base[a:b].add_(total)

    def normal(self, count, seeds, parameter, stream, device, start=0):
        """`count` numbers of a stream of each seed, from `start` on: float32 (M, count)."""
        return torch.stack([normal(int(seed), parameter, start, count, device, stream) for seed in seeds])

    def lowrank_update(self, base, seeds, coefficients, parameter, rank, matrix=0):
        """base += sum_i coefficients_i * E(seeds_i) for a matrix; see `definition.lowrank_updated`."""
        for tile in scaled_factors(self, base, seeds, coefficients, parameter, rank, matrix):
            total = torch.zeros(tile.a.shape[1], tile.b.shape[1], device=base.device)
            for a, b in zip(tile.a, tile.b, strict=True):
                total.add_(a[:, None] * b)
            base[tile.row :, tile.column :][: len(total), : total.shape[1]].add_(total)

    def digest(self, base, parameter, start=0):
        """The base's digest: int64 (), on its device; add over slices and parameters modulo 2^64."""
        total = torch.zeros((), dtype=torch.int64, device=base.device)
        for a, b in _slices(base.numel()):
            position = torch.arange(start + a, start + b, dtype=torch.int64, device=base.device)
            upper = (position >> 32) * definition.DIGEST_SPREAD
            w = ((position ^ upper) & LOW) ^ parameter
            for shift, multiplier in zip((16, 13), definition.DIGEST_MIXERS, strict=True):
                w = ((w ^ (w >> shift)) * multiplier) & LOW
            w = (w ^ (w >> 16)) | 1
            bits = base[a:b].view(torch.int32).to(torch.int64) & LOW
            total += (w * bits).sum()  # integers wrap
        return total

    def round(self, value, base, seed, parameter, start=0):
        """base <- value, rounded at random; see `definition.rounded`. Flat; float32 to bfloat16."""
        for a, b in _slices(value.numel()):
            stream = definition.STREAM_ROUNDING
            random = integers(seed, parameter, start + a, b - a, value.device, stream)
            bits = value[a:b].view(torch.int32).to(torch.int64) & LOW
            up = torch.where(value[a:b].isnan(), bits | 0x400000, bits + random) >> 16
            base[a:b].view(torch.int16).copy_(up)  # int64 to int16 keeps the low bits
