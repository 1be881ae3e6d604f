"""Low-rank perturbations: a block of members evaluated in one batch, on shared unperturbed weights.

A matrix's noise is E = A^T B / sqrt(r) (EGGROLL, arXiv 2511.16652), so a member's product is

    y = x W^T + (sigma sign / sqrt(r)) (x B^T) A,

where the first product is shared by all members and the second is cheap: all members' factors are
stacked, and of x B^T only a row's own member's numbers are kept. Which row of a batch is which member's
is said by `rows`. Linear layers, Conv1D and embeddings get low-rank noise, tied ones the same; vectors
(norms, biases) get full noise, a vector per member. The weights themselves are never touched. What a
module of each kind computes is in lowrank_kinds.py.

The forward of every module with parameters is replaced; without a block, it calls the one that was there.
On CPUs, `linear_cpu.install` replaces forwards, too, before or after: it skips modules whose forward
was replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from mpies.es.population import Member
from mpies.model.lowrank_block import Block, Factors
from mpies.model.lowrank_cpu import Share, at_once
from mpies.model.lowrank_ways import Ways
from mpies.model.weights import Weights
from mpies.noise import Kernels
from mpies.noise.definition import STREAM_A, STREAM_B, STREAM_NOISE, matrices_in
from mpies.noise.factors import PANEL
from mpies.noise.uploads import uploaded


class LowRank:
    """Makes a model compute with a block of members at once, between `set` and `clear`.

    Raises `Unfit`, an InputError, while the model computes, if a module is used in a way that is not known;
    `give_way` then finds a simpler one.
    """

    def __init__(self, model: nn.Module, weights: Weights, rank: int):
        self.weights = weights
        self.rank = rank
        self.block = Block(rank, share_of(weights.kernels))
        self.ways = Ways(model, self.block, weights.base)

    def set(self, members: list[Member], sigma: float) -> None:
        """Draw the block's noise: M (rows + columns) rank numbers per matrix, M times a vector's."""
        self.set_each(members, dict.fromkeys(self.weights.base, sigma))

    def set_each(self, members: list[Member], sigmas: Mapping[str, float]) -> None:
        """The same with a sigma for each parameter."""
        self.weights.show_base()  # which members do not touch: an update does
        self.weights.changed()
        block, dtype = self.block, self.weights.dtype
        block.members = len(members)
        for name, base in self.weights.base.items():
            made = partial(torch.empty, dtype=dtype, device=self.weights.device)
            count, sigma = len(members), sigmas[name]
            if stack := matrices_in(base.shape):
                several = [stack] if base.dim() > 2 else []
                a, b = (made(count, *several, self.rank, length) for length in base.shape[-2:])
                draw_factors(a, b, self.weights, members, name, sigma)
                block.matrices[name] = Factors(a, b)
            else:
                block.vectors[name] = made(count, base.numel())
                draw_vectors(block.vectors[name], self.weights, members, name, sigma)

    def rows(self, members: torch.Tensor) -> None:
        """From now on, row i of a batch belongs to member members[i] of the block; int64 (rows,)."""
        if self.block.members:
            self.block.assign(members)

    def clear(self) -> None:
        """Back to the plain model, with the base's weights."""
        self.weights.show_base()
        self.rest()

    def rest(self) -> None:
        """Back to the plain model, with the live weights as they are."""
        self.block.members = 0
        self.block.matrices.clear()
        self.block.vectors.clear()
        self.weights.changed()


def draw_factors(
    a: torch.Tensor, b: torch.Tensor, weights: Weights, members: list[Member], name: str, sigma: float
) -> None:
    """a (M, rank, rows), b (M, rank, columns) <- the members' noise of a matrix: E = A^T B / sqrt(rank).

    What it is multiplied with, sigma sign / sqrt(rank), is in a. Of a stack of S: (M, S, rank, ...).
    """
    _draw(a, weights, members, name, STREAM_A, sigma / math.sqrt(a.shape[-2]))
    _draw(b, weights, members, name, STREAM_B)


def draw_vectors(
    into: torch.Tensor, weights: Weights, members: list[Member], name: str, sigma: float
) -> None:
    """into (M, size) <- the members' own vectors, base + sigma sign noise: float32 until it is rounded."""
    noise = torch.empty(into.shape, device=into.device)
    _draw(noise, weights, members, name, STREAM_NOISE, sigma)
    into.copy_(noise.add_(weights.value(name).view(-1)))


def count_noise(shapes: Iterable[torch.Size], rank: int) -> int:
    """Numbers of a member's noise of parameters of these shapes: matrices' factors, a vector's own."""
    counts = ((shape, matrices_in(shape)) for shape in shapes)
    return sum(count * rank * sum(shape[-2:]) if count else shape.numel() for shape, count in counts)


def _draw(
    into: torch.Tensor,
    weights: Weights,
    members: list[Member],
    name: str,
    stream: int,
    scale: float | None = None,
) -> None:
    """into (M, ...) <- every member's numbers of a parameter's stream, times scale * sign if one is given.

    The product is one of float32, rounded to the dtype of `into`.
    """
    count = into[0].numel()
    most = max(1, PANEL // count)  # members at a time: their numbers are float32 first
    for first in range(0, len(members), most):
        some, part = members[first : first + most], into[first : first + most]
        seeds = [member.seed for member in some]
        noise = weights.kernels.normal(count, seeds, weights.ids[name], stream, into.device)
        if scale is not None:
            scales = np.array([scale * member.sign for member in some], np.float32)
            noise *= uploaded(scales, into.device)[:, None]
        part.copy_(noise.view(part.shape))


def share_of(kernels: Kernels) -> Share:
    """How the kernels spread work over threads, or all of it at once."""
    return getattr(kernels, "share", at_once)
