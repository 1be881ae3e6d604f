"""A block's low-rank products on a GPU, fused: y_i += sum_k (x_i . b_mk) a_mk + bias_m, m being i's member.

A token's time while decoding on a GPU is that of launching its operations. As matrix products for all
members at once, each layer's noise takes three of them, and a bias one more; here it is one, and a row
computes with its own member's numbers only. A norm with each row's own vector is one operation instead of
eight. Sums are in float32, and y is rounded once. As with any matrix product, the last bits depend on the
GPU, but on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpies.noise.gpu import launch

# Elements of a program's tile, whatever its rank, and outputs that it goes through.
TILE, SPAN = 1024, 4096


@triton.jit
def _row(members):
    """This program's token among all rows' tokens, and its row's member; int64."""
    row = tl.program_id(1).to(tl.int64)
    return row * tl.num_programs(0) + tl.program_id(0), tl.load(members + row)


@triton.jit
def _add(
    y, x, members, a, b, bias, inputs, outputs, rank: tl.constexpr, terms: tl.constexpr,
    width: tl.constexpr, span: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    row, member = _row(members)
    term = tl.arange(0, terms)  # a power of two: those from `rank` on are nobody's
    place = tl.arange(0, width)
    x += row * inputs
    b += member * rank * inputs
    sums = tl.zeros((terms, width), tl.float32)
    for first in range(0, inputs, width):
        inside = first + place < inputs
        given = tl.load(x + first + place, inside, other=0).to(tl.float32)
        mine = (term < rank)[:, None] & inside[None, :]
        left = tl.load(b + term[:, None] * inputs + first + place[None, :], mine, other=0).to(tl.float32)
        sums += left * given[None, :]
    dots = tl.sum(sums, axis=1)
    y += row * outputs
    a += member * rank * outputs
    bias += member * outputs
    begin = tl.program_id(2) * span
    for first in range(begin, min(begin + span, outputs), width):
        inside = first + place < outputs
        mine = (term < rank)[:, None] & inside[None, :]
        right = tl.load(a + term[:, None] * outputs + first + place[None, :], mine, other=0).to(tl.float32)
        value = tl.load(y + first + place, inside).to(tl.float32) + tl.sum(dots[:, None] * right, axis=0)
        if biased:
            value += tl.load(bias + first + place, inside).to(tl.float32)
        tl.store(y + first + place, value.to(y.dtype.element_ty), inside)


@triton.jit
def _rms_norm(y, x, members, vectors, epsilon, size, count, width: tl.constexpr):
    row, member = _row(members)
    place = tl.arange(0, width)
    inside = place < size
    given = tl.load(x + row * size + place, inside, other=0).to(tl.float32)
    mean = tl.div_rn(tl.sum(given * given, axis=0), count)
    normal = tl.div_rn(given, tl.sqrt_rn(mean + epsilon))
    # Rounded before it is multiplied, as in transformers.
    normal = normal.to(y.dtype.element_ty).to(tl.float32)
    value = tl.load(vectors + member * size + place, inside).to(tl.float32) * normal
    tl.store(y + row * size + place, value.to(y.dtype.element_ty), inside)


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    members: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rank: int,
    bias: torch.Tensor | None,
) -> None:
    """Add the low-rank products, and each row's own bias, to y (R, ..., N), in place.

    x (R, ..., K); members int64 (R,); a (M rank, N), b (M rank, K), bias (M, N). All contiguous and of y's
    dtype, any float.
    """
    outputs, inputs = y.shape[-1], x.shape[-1]
    if not y.numel():
        return
    tokens, terms = y.numel() // outputs // len(members), triton.next_power_of_2(rank)
    launch(
        _add, (tokens, len(members), triton.cdiv(outputs, SPAN)),
        y, x, members, a, b, y if bias is None else bias, inputs, outputs, rank, terms,
        max(TILE // terms, 32), SPAN, bias is not None,
    )  # fmt: skip


def rms_norm(x: torch.Tensor, members: torch.Tensor, vectors: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon), times each row's own member's vector.

    x (R, ..., N), contiguous; members int64 (R,); vectors (M, N) of x's dtype. In x's shape and dtype.
    """
    y, size = torch.empty_like(x), x.shape[-1]
    if x.numel():
        tokens, width = x.numel() // size // len(members), triton.next_power_of_2(size)
        launch(
            _rms_norm, (tokens, len(members)), y, x, members, vectors, epsilon, size, float(size), width,
            num_warps=4 if width <= 4096 else 16,
        )  # fmt: skip
    return y
