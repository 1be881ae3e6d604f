"""A block of members: their noise of low rank, and whose member each row of a batch is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn import functional

from mpies.model import lowrank_cpu

# What torch calls NVIDIA's and AMD's GPUs; lowrank_gpu is made for tensors there.
FUSED_ON = {"cuda"}


@dataclass
class Factors:
    """A block's noise of one matrix, in the live dtype.

    a: (M, rank, rows), with sigma sign / sqrt(rank) in it; b: (M, rank, columns).
    """

    a: torch.Tensor
    b: torch.Tensor

    @cached_property
    def raw(self) -> lowrank_cpu.RawFactors:
        return lowrank_cpu.RawFactors.of(self.a, self.b.unsqueeze(1))

    def turned(self) -> Factors:
        """Those of the transposed matrix."""
        return Factors(self.b, self.a)


class Block:
    """M members; `matrices` and `vectors` have their noise, by the parameters' names.

    A vector's is (M, size), in the live dtype, with the base's values in it. No members: the plain model.
    """

    def __init__(self, rank: int, share: lowrank_cpu.Share):
        self.rank = rank
        self.share = share
        self.members = 0
        self.matrices: dict[str, Factors] = {}
        self.vectors: dict[str, torch.Tensor] = {}

    def assign(self, members: torch.Tensor) -> None:
        """From now on, row i of a batch belongs to member members[i]; int64 (rows,)."""
        self.row_members = members
        vars(self).pop("members_array", None)
        everyone = torch.arange(self.members, device=members.device).repeat_interleave(self.rank)
        # (rows, 1, M rank): of all members' numbers, each row keeps its own member's.
        dtype = next(iter(self.vectors.values()), members).dtype
        self._own = (everyone == members[:, None, None]).to(dtype)
        self._row_vectors = {name: vectors[members].unsqueeze(1) for name, vectors in self.vectors.items()}

    @cached_property
    def members_array(self) -> np.ndarray:
        """Every row's member, on the host: a GPU is waited for."""
        return self.row_members.cpu().numpy()

    def fuses(self, x: torch.Tensor) -> bool:
        """Are there operations of one launch for x? Each row needs its own member, in memory without gaps."""
        return fuses(x)

    def vector(self, name: str, dims: int) -> torch.Tensor:
        """Every row's own vector, (rows, 1, ..., size) with so many dimensions."""
        vector = self._row_vectors[name]
        return vector.view(-1, *[1] * (dims - 2), vector.shape[-1])

    def add_product(self, y: torch.Tensor, x: torch.Tensor, noise: Factors, bias: str | None = None) -> None:
        """y (rows, ..., N) += x (rows, ..., K) times each row's own E^T, and its own vector `bias`, in place.

        y is contiguous.
        """
        if self.fuses(x):
            from mpies.model import lowrank_gpu

            vectors = None if bias is None else self.vectors[bias]
            members = self.row_members
            lowrank_gpu.add(y, x.contiguous(), members, noise.a, noise.b, self.rank, vectors)
            return
        if lowrank_cpu.knows(x):
            lowrank_cpu.add(y, x.contiguous(), self.members_array, noise.raw, self.share)
        else:
            own = functional.linear(x, noise.b.view(-1, x.shape[-1]))
            own = own * self._own.view(-1, *[1] * (x.dim() - 2), own.shape[-1])
            y.view(-1, y.shape[-1]).addmm_(own.view(-1, own.shape[-1]), noise.a.view(-1, y.shape[-1]))
        if bias is not None:
            y += self.vector(bias, y.dim())

    def looked_up(self, ids: torch.Tensor, weight: torch.Tensor, noise: Factors) -> torch.Tensor:
        """Rows `ids` (rows, tokens) of the weight, each plus its noise: (rows, tokens, columns)."""
        members = self.row_members
        a, b = noise.a[members[:, None], :, ids], noise.b[members]
        return torch.baddbmm(functional.embedding(ids, weight), a, b)


def fuses(x: torch.Tensor) -> bool:
    """Are there kernels for x's device, in lowrank_gpu.py?"""
    return x.device.type in FUSED_ON and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
