"""A block's low-rank products on a GPU, fused: y_i += sum_k (x_i . b_mk) a_mk + bias_m, m being i's member.

A token's time while decoding on a GPU is that of launching its operations. As matrix products for all
members at once, each layer's noise takes three of them, and a bias one more; here it is one, and a row
computes with its own member's numbers only. A norm with each row's own vector is one operation instead of
eight. Sums are in float32, and y is rounded once. As with any matrix product, the last bits depend on the
GPU, but on nothing else.

Tokens are along a grid's first axis, the only one that CUDA lets grow beyond 65535: a mixture of experts has
a row for each expert that each goes to.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from mpies.noise.gpu import launch

# Elements of a program's tile, whatever its rank, and outputs that it goes through.
TILE, SPAN = 1024, 4096


@triton.jit
def _token(members, tokens):
    """This program's token among all rows' tokens, of which each row has so many; its row's member. int64."""
    token = tl.program_id(0)
    return token.to(tl.int64), tl.load(members + token // tokens)


@triton.jit
def _dots(x, b, inputs, rank: tl.constexpr, terms: tl.constexpr, width: tl.constexpr):
    """A row x (inputs,) times b (rank, inputs), float32 (terms,)."""
    term = tl.arange(0, terms)  # a power of two: those from `rank` on are nobody's
    place = tl.arange(0, width)
    sums = tl.zeros((terms, width), tl.float32)
    for first in range(0, inputs, width):
        inside = first + place < inputs
        given = tl.load(x + first + place, inside, other=0).to(tl.float32)
        mine = (term < rank)[:, None] & inside[None, :]
        left = tl.load(b + term[:, None] * inputs + first + place[None, :], mine, other=0).to(tl.float32)
        sums += left * given[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _spread(
    y, a, bias, dots, begin, end, outputs, rank: tl.constexpr, terms: tl.constexpr, width: tl.constexpr,
    biased: tl.constexpr,
):  # fmt: skip
    """Outputs begin to end of a row y (outputs,) += dots times a (rank, outputs), and the bias."""
    term = tl.arange(0, terms)
    place = tl.arange(0, width)
    for first in range(begin, end, width):
        inside = first + place < end
        mine = (term < rank)[:, None] & inside[None, :]
        right = tl.load(a + term[:, None] * outputs + first + place[None, :], mine, other=0).to(tl.float32)
        value = tl.load(y + first + place, inside).to(tl.float32) + tl.sum(dots[:, None] * right, axis=0)
        if biased:
            value += tl.load(bias + first + place, inside).to(tl.float32)
        tl.store(y + first + place, value.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _add(
    y, x, members, a, b, bias, tokens: tl.int32, inputs, outputs, rank: tl.constexpr, terms: tl.constexpr,
    width: tl.constexpr, span: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    token, member = _token(members, tokens)
    dots = _dots(x + token * inputs, b + member * rank * inputs, inputs, rank, terms, width)
    begin = tl.program_id(1) * span
    _spread(
        y + token * outputs, a + member * rank * outputs, bias + member * outputs, dots,
        begin, min(begin + span, outputs), outputs, rank, terms, width, biased,
    )  # fmt: skip


@triton.jit
def _add_parts(
    y, x, members, a, b, bias, spans, inputs, outputs, parts, rank: tl.constexpr, terms: tl.constexpr,
    width: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = tl.load(members + row)
    mine = spans + 3 * tl.program_id(1)
    part, begin, end = tl.load(mine), tl.load(mine + 1).to(tl.int32), tl.load(mine + 2).to(tl.int32)
    b += (member * parts + part) * rank * inputs
    dots = _dots(x + row * inputs, b, inputs, rank, terms, width)
    _spread(
        y + row * outputs, a + member * rank * outputs, bias + member * outputs, dots,
        begin, end, outputs, rank, terms, width, biased,
    )  # fmt: skip


@triton.jit
def _add_looked_up(
    y, ids, members, a, b, columns, entries, parts, rank: tl.constexpr, terms: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member, token = tl.load(members + row), tl.load(ids + row)
    term, place = tl.arange(0, terms), tl.arange(0, width)
    left = tl.load(a + (member * rank + term) * entries + token, term < rank, other=0).to(tl.float32)
    b += member * parts * rank * columns
    y += row * columns
    for first in range(0, columns, width):
        inside = first + place < columns
        mine = (term < rank)[:, None] & inside[None, :]
        right = tl.load(b + term[:, None] * columns + first + place[None, :], mine, other=0).to(tl.float32)
        value = tl.load(y + first + place, inside).to(tl.float32) + tl.sum(left[:, None] * right, axis=0)
        tl.store(y + first + place, value.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm(
    y, x, residual, members, vectors, tokens: tl.int32, epsilon, size, count, width: tl.constexpr,
    summed: tl.constexpr, plus_one: tl.constexpr,
):  # fmt: skip
    token, member = _token(members, tokens)
    place = tl.arange(0, width)
    inside = place < size
    given = tl.load(x + token * size + place, inside, other=0).to(tl.float32)
    if summed:
        given += tl.load(residual + token * size + place, inside, other=0).to(tl.float32)
        tl.store(residual + token * size + place, given.to(y.dtype.element_ty), inside)
    mean = tl.div_rn(tl.sum(given * given, axis=0), count)
    normal = tl.div_rn(given, tl.sqrt_rn(mean + epsilon))
    vector = tl.load(vectors + member * size + place, inside).to(tl.float32)
    if plus_one:
        vector += 1.0
    else:  # rounded before it is multiplied, as in transformers
        normal = normal.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + token * size + place, (vector * normal).to(y.dtype.element_ty), inside)


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
        _add, (tokens * len(members), triton.cdiv(outputs, SPAN)),
        y, x, members, a, b, y if bias is None else bias, tokens, inputs, outputs, rank, terms,
        max(TILE // terms, 32), SPAN, bias is not None,
    )  # fmt: skip


def spans_of(bounds: list[int]) -> list[list[int]]:
    """What each program of `add_parts` does of a row: [part, first output, the last's next]."""
    return [
        [part, begin, min(begin + SPAN, last)]
        for part, (first, last) in enumerate(itertools.pairwise(bounds))
        for begin in range(first, last, SPAN)
    ]


def add_parts(
    y: torch.Tensor,
    x: torch.Tensor,
    members: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    spans: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """The same for a matrix whose parts lie one below the other, each with a b of its own.

    y (T, N), x (T, K), members int64 (T,), a (M, rank, N), b (M, parts, rank, K), bias (M, N); spans int64
    (S, 3) on y's device, as `spans_of` has them. A row depends on itself only.
    """
    _, parts, rank, inputs = b.shape
    if not y.numel():
        return
    terms = triton.next_power_of_2(rank)
    launch(
        _add_parts, (len(members), len(spans)),
        y, x, members, a, b, y if bias is None else bias, spans, inputs, a.shape[2], parts, rank, terms,
        max(TILE // terms, 32), bias is not None,
    )  # fmt: skip


def add_looked_up(
    y: torch.Tensor, ids: torch.Tensor, members: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Add to y (T, K), rows `ids` of a matrix, those of each token's own noise: ids, members int64 (T,).

    a (M, rank, N), b (M, parts, rank, K), of which the first part is taken.
    """
    _, parts, rank, columns = b.shape
    if y.numel():
        terms = triton.next_power_of_2(rank)
        launch(
            _add_looked_up, (len(members),),
            y, ids, members, a, b, columns, a.shape[2], parts, rank, terms, max(TILE // terms, 32),
        )  # fmt: skip


def rms_norm(
    x: torch.Tensor,
    members: torch.Tensor,
    vectors: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None = None,
    plus_one: bool = False,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon), times each row's own member's vector, to which 1 is added if so said.

    x (R, ..., N), contiguous; members int64 (R,); vectors (M, N) of x's dtype. In x's shape and dtype. A
    residual is added first, and then holds the sum.
    """
    y, size = torch.empty_like(x), x.shape[-1]
    if x.numel():
        tokens, width = x.numel() // size // len(members), triton.next_power_of_2(size)
        launch(
            _rms_norm, (tokens * len(members),), y, x, y if residual is None else residual, members, vectors,
            tokens, epsilon, size, float(size), width, residual is not None, plus_one,
            num_warps=4 if width <= 4096 else 16,
        )  # fmt: skip
    return y
