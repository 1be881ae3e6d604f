"""A block of members: their noise of low rank, and whose member each row of a batch is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional

from mpies.model import lowrank_cpu

# What torch calls NVIDIA's and AMD's GPUs; lowrank_gpu is made for tensors there.
FUSED_ON = {"cuda"}


@dataclass
class Factors:
    """A block's noise of one matrix, in the live dtype.

    a: (M, rank, rows), with sigma sign / sqrt(rank) in it; b: (M, rank, columns). Of a stack of S matrices:
    (M, S, rank, rows) and (M, S, rank, columns).
    """

    a: torch.Tensor
    b: torch.Tensor

    @cached_property
    def raw(self) -> lowrank_cpu.RawFactors:
        return lowrank_cpu.RawFactors.of(self.a, self.b.unsqueeze(1))

    def turned(self) -> Factors:
        """Those of the transposed matrix."""
        return Factors(self.b, self.a)

    @cached_property
    def each(self) -> Factors:
        """A stack's, as those of M S members: matrix s of member m is the (m S + s)th."""
        return Factors(self.a.flatten(0, 1), self.b.flatten(0, 1))

    def added_to(self, weight: torch.Tensor, member: int) -> torch.Tensor:
        """A member's own matrix, or stack of matrices: the weight with its noise, in new memory."""
        a, b = self.a[member], self.b[member]
        return weight + (a.mT @ b).to(weight.dtype)


@dataclass
class Rows:
    """Whose member each row of a batch is. A single row stands for as many as there are, of one member."""

    members: torch.Tensor
    """int64 (rows,)"""
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Each row's own vectors, by name: (rows, 1, size)."""

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def array(self) -> np.ndarray:
        """The members on the host: a GPU is waited for."""
        return self.members.cpu().numpy()

    @cached_property
    def runs(self) -> list[tuple[slice, int, Rows]]:
        """Neighbouring rows of one member: which they are, whose, and one row that stands for them."""
        found, first = [], 0
        for member, rows in groupby(self.array.tolist()):
            last = first + len(list(rows))
            found.append((slice(first, last), member, Rows(self.members[first : first + 1])))
            first = last
        return found


class Block:
    """M members; `matrices` and `vectors` have their noise, by the parameters' names.

    A vector is what has no factors, of any shape: (M, size), in the live dtype, with the base's values in
    it. No members: the plain model.
    """

    def __init__(self, rank: int, share: lowrank_cpu.Share):
        self.rank = rank
        self.share = share
        self.members = 0
        self.matrices: dict[str, Factors] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.rows: Rows
        self.alone = False
        """Does all that is computed now belong to one member?"""
        self.tokens = 0
        """Of each row in the forward pass that is being computed."""

    def assign(self, members: torch.Tensor) -> None:
        """From now on, row i of a batch belongs to member members[i]; int64 (rows,)."""
        self.rows = Rows(members)
        # The fused CPU kernel, and neighbouring rows, need no mask: others make one for every product.
        self._own: torch.Tensor | None = None

    @contextmanager
    def lone(self, rows: Rows) -> Iterator[None]:
        """For the time being, everything belongs to the member of `rows`, which is a single row."""
        before = self.rows, self.alone, self._own
        self.rows, self.alone, self._own = rows, True, None
        try:
            yield
        finally:
            self.rows, self.alone, self._own = before

    def fuses(self, x: torch.Tensor) -> bool:
        """Are there operations of one launch for x? Each row needs its own member, in memory without gaps."""
        return fuses(x)

    def vector(self, name: str, dims: int) -> torch.Tensor:
        """Every row's own vector, (rows, 1, ..., size) with so many dimensions."""
        vector = self.rows.vectors.get(name)
        if vector is None:
            vector = self.vectors[name][self.rows.members].unsqueeze(1)
            self.rows.vectors[name] = vector
        return vector.view(-1, *[1] * (dims - 2), vector.shape[-1])

    def add_product(self, y: torch.Tensor, x: torch.Tensor, noise: Factors, bias: str | None = None) -> None:
        """y (rows, ..., N) += x (rows, ..., K) times each row's own E^T, and its own vector `bias`, in place.

        y is contiguous. Tokens of all rows together, (rows tokens, ...), are rows one after another as well.
        """
        if self.fuses(x):
            from mpies.model import lowrank_gpu

            vectors = None if bias is None else self.vectors[bias]
            lowrank_gpu.add(y, x.contiguous(), self.rows.members, noise.a, noise.b, self.rank, vectors)
            return
        if lowrank_cpu.knows(x):
            lowrank_cpu.add(y, x.contiguous(), self.rows.array, noise.raw, self.share)
        else:
            self._add_masked(y, x, noise)
        if bias is not None:
            each = y.view(len(self.rows), -1, y.shape[-1])
            each += self.vector(bias, 3)

    def _add_masked(self, y: torch.Tensor, x: torch.Tensor, noise: Factors) -> None:
        """Of all members' products, each row keeps its own member's."""
        if self._own is None:
            everyone = torch.arange(self.members, device=x.device).repeat_interleave(self.rank)
            self._own = (everyone == self.rows.members[:, None, None]).to(x.dtype)  # (rows, 1, M rank)
        own = functional.linear(x, noise.b.view(-1, x.shape[-1]))
        own = own.view(len(self.rows), -1, own.shape[-1]) * self._own
        y.view(-1, y.shape[-1]).addmm_(own.view(-1, own.shape[-1]), noise.a.view(-1, y.shape[-1]))

    def add_chosen(self, y: torch.Tensor, x: torch.Tensor, noise: Factors, chosen: torch.Tensor) -> None:
        """y (S, N) += x (S, K) times E^T of factors number chosen[i], int64 (S,), of `noise`, in place."""
        if self.fuses(x):
            from mpies.model import lowrank_gpu

            lowrank_gpu.add(y, x.contiguous(), chosen, noise.a, noise.b, self.rank, None)
        elif lowrank_cpu.knows(x):
            lowrank_cpu.add(y, x.contiguous(), chosen.numpy(), noise.raw, self.share)
        else:
            own = torch.bmm(noise.b[chosen], x.unsqueeze(-1))  # (S, rank, 1)
            y += torch.bmm(own.mT, noise.a[chosen])[:, 0]

    def members_of(self, tokens: int) -> torch.Tensor:
        """Each token's member, of so many tokens of all rows one after another: int64 (tokens,)."""
        members = self.rows.members
        return members if len(members) == tokens else members.repeat_interleave(tokens // len(members))

    def looked_up(self, ids: torch.Tensor, weight: torch.Tensor, noise: Factors) -> torch.Tensor:
        """Rows `ids` (rows, tokens) of the weight, each plus its noise: (rows, tokens, columns).

        Or of patches of all rows, one after another, with some ids each: their positions, interpolated.
        """
        members = self.members_of(len(ids))
        a, b = noise.a[members[:, None], :, ids], noise.b[members]
        return torch.baddbmm(functional.embedding(ids, weight), a, b)


def fuses(x: torch.Tensor) -> bool:
    """Are there kernels for x's device, in lowrank_gpu.py?"""
    return x.device.type in FUSED_ON and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
