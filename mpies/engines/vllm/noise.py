"""A block's noise of vLLM's matrices: buffers that are drawn into in place, and what layers add of it.

On a GPU, what a layer adds is one operation, a Triton kernel's launch. torch.compile sees it as one, too,
and does not look inside. Each row depends on itself only.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from mpies.engines.vllm.members import Owners
from mpies.model import lowrank_cpu
from mpies.model.lowrank_block import fuses


class MatrixNoise(nn.Module):
    """A block's noise of a matrix (N, K) whose parts lie one below the other.

    a (M + 1, rank, N), with sigma sign / sqrt(rank) in it; b (M + 1, parts, rank, K); bias (M + 1, N). The
    last of each is nobody's: no noise, or the base's bias.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    spans: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        sizes: list[int],
        block: int,
        rank: int,
        *,
        bias: torch.Tensor | None = None,
        padding: int = 0,
    ):
        super().__init__()
        rows, columns = weight.shape
        self.bounds = list(itertools.accumulate(sizes, initial=0))
        self.padding = padding
        assert self.bounds[-1] == rows
        made = weight.new_zeros
        self.register_buffer("a", made(block + 1, rank, rows), persistent=False)
        self.register_buffer("b", made(block + 1, len(sizes), rank, columns), persistent=False)
        self.register_buffer("bias", None if bias is None else made(block + 1, rows), persistent=False)
        self.register_buffer("spans", _spans(weight, self.bounds), persistent=False)
        self.raw = (
            lowrank_cpu.RawFactors.of(self.a, self.b, self.bounds, self.bias)
            if lowrank_cpu.knows(weight)
            else None
        )

    def parts_of(self, first: int, last: int) -> list[int]:
        """The parts that rows [first, last) of the matrix are; none unless they are whole parts.

        But for rows at the end that pad a vocabulary.
        """
        edges = list(itertools.pairwise([*self.bounds[:-1], self.bounds[-1] - self.padding]))
        inside = [part for part, (a, b) in enumerate(edges) if first <= a and b <= last]
        whole = inside and (edges[inside[0]][0], edges[inside[-1]][1]) == (first, last)
        return inside if whole else []

    def add(self, y: torch.Tensor, x: torch.Tensor, owners: Owners, share: lowrank_cpu.Share) -> torch.Tensor:
        """y (..., N) plus the members' own products of x (..., K), and their biases; y may be overwritten.

        Raises InputError for other rows than those that have owners.
        """
        rows = y.numel() // y.shape[-1]
        if self.raw is not None:
            lowrank_cpu.add(y, x.contiguous(), owners.of(rows), self.raw, share)
            return y
        own = owners.at(rows)
        if self.spans is not None:
            torch.ops.mpies.add_products(y, x.contiguous(), own, self.a, self.b, self.spans, self.bias)
            return y
        return self._added(y.reshape(rows, -1), x.reshape(rows, -1), own).view(y.shape)

    def look_up(self, found: torch.Tensor, ids: torch.Tensor, owners: Owners) -> torch.Tensor:
        """found (T, K), the matrix's rows `ids`, plus those of each token's own member's noise."""
        own = owners.at(ids.shape[0])
        if self.spans is not None:
            torch.ops.mpies.add_looked_up(found, ids, own, self.a, self.b)
            return found
        a, b = self.a[own, :, ids], self.b[own, 0]
        return torch.baddbmm(found[:, None], a[:, None], b)[:, 0]

    def _added(self, y: torch.Tensor, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """By torch's operations: y (T, N), x (T, K), own int64 (T,)."""
        dots = (self.b[own].float() * x[:, None, None].float()).sum(-1)  # (T, parts, rank)
        spread = torch.cat(
            [
                dots[:, part, :, None].expand(-1, -1, last - first)
                for part, (first, last) in enumerate(itertools.pairwise(self.bounds))
            ],
            dim=-1,
        )
        total = y.float() + (spread * self.a[own].float()).sum(1)
        if self.bias is not None:
            total = total + self.bias[own].float()
        return total.to(y.dtype)


def _spans(weight: torch.Tensor, bounds: list[int]) -> torch.Tensor | None:
    """Of `lowrank_gpu.spans_of`; None where its kernels are not for."""
    if not fuses(weight):
        return None
    from mpies.model import lowrank_gpu

    return torch.tensor(lowrank_gpu.spans_of(bounds), device=weight.device)


@torch.library.custom_op("mpies::add_products", mutates_args={"y"})
def _add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    members: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    spans: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    from mpies.model import lowrank_gpu

    lowrank_gpu.add_parts(y, x, members, a, b, spans, bias)


@torch.library.custom_op("mpies::add_looked_up", mutates_args={"y"})
def _add_looked_up(
    y: torch.Tensor, ids: torch.Tensor, members: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    from mpies.model import lowrank_gpu

    lowrank_gpu.add_looked_up(y, ids, members, a, b)


@torch.library.custom_op("mpies::add_and_norm", mutates_args={"residual"})
def _add_and_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    members: torch.Tensor,
    vectors: torch.Tensor,
    epsilon: float,
    plus_one: bool,
) -> torch.Tensor:
    from mpies.model import lowrank_gpu

    return lowrank_gpu.rms_norm(x.contiguous(), members, vectors, epsilon, residual, plus_one)


@_add_and_norm.register_fake
def _(x, residual, members, vectors, epsilon, plus_one):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_products.register_fake
@_add_looked_up.register_fake
def _(*arguments):
    return None


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    vectors: torch.Tensor,
    owners: Owners,
    epsilon: float,
    plus_one: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `norm_cpu.rms_norm`, on the devices that it or the kernels for GPUs are for."""
    if lowrank_cpu.knows(vectors):
        from mpies.model import norm_cpu

        return norm_cpu.rms_norm(x, residual, vectors, owners.of(x.shape[0]), epsilon, plus_one)
    residual = None if residual is None else residual.contiguous()
    own = owners.at(x.shape[0])
    return torch.ops.mpies.add_and_norm(x, residual, own, vectors, epsilon, plus_one), residual
