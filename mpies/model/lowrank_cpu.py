"""A block's low-rank products on a CPU, fused: y_i += sum_k (x_i . b_mk) a_mk, m being row i's member.

As two small matrix products the same takes several times as long: each call copies an operand, and
computes every member's products for every row. Sums are in float32 and y is rounded once. As with any
matrix product, the last bits depend on the processor, but on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from mpies.noise.compiling import njit
from mpies.noise.cpu_kernels import to_bfloat16

# share(count, work) calls work(first, last) on parts of a count, on several threads.
Share = Callable[[int, Callable[[int, int], None]], Any]


def at_once(count: int, work: Callable[[int, int], None]) -> None:
    """All of it on this thread: a `Share`."""
    work(0, count)


# The order of a sum's terms is the compiler's; infinities and NaN stay what they are.
LOOSE = {"reassoc", "contract", "nsz"}
SIXTEEN = np.uint32(16)
NONE = (0, 0)

# Work for more than one thread, in elements of x and y.
WORTH_SHARING = 2**18


@dataclass(frozen=True)
class RawFactors:
    """Of a block's noise of one matrix, or of several that lie one below the other: `raw` arrays.

    a: (M, rank, N), with sigma sign / sqrt(rank) in it; b: (M, parts, rank, K). Part p is rows
    bounds[p] to bounds[p + 1] of N; int64 (parts + 1,). bias: (M, N), or (0, 0) for none.
    """

    a: np.ndarray
    b: np.ndarray
    bounds: np.ndarray
    bias: np.ndarray
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        bounds: list[int] | None = None,
        bias: torch.Tensor | None = None,
    ) -> RawFactors:
        """The same memory; of one matrix, if no bounds are given."""
        edges = np.array(bounds or [0, a.shape[-1]], np.int64)
        shifts = raw(a).reshape(-1)[:0].reshape(NONE) if bias is None else raw(bias)
        return cls(raw(a), raw(b), edges, shifts, a.dtype)


def wide(value):
    """A raw number as float32."""


def narrow(value, like):
    """A float32 as a raw number of the type of `like`."""


@overload(wide, inline="always")
def _wide_of(value):
    if value is types.uint16:
        return lambda value: np.uint32(np.uint32(value) << SIXTEEN).view(np.float32)
    return lambda value: value


@overload(narrow, inline="always")
def _narrow_of(value, like):
    if like is types.uint16:
        return lambda value, like: to_bfloat16(np.float32(value).view(np.uint32))
    return lambda value, like: np.float32(value)


@intrinsic
def _pointer(typing, address):
    """An integer as a pointer."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(inline="always")
def at(address, shape, like):
    """The raw numbers at an address, of the type of those of `like`: see `place`."""
    return carray(_pointer(address), shape, like.dtype)  # type: ignore[call-arg]  # the first is numba's


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _add(y_place, x_place, first_row, last_row, tokens, members, a, b, bounds, bias):
    """Rows first_row to last_row of y (T, N) and x (T, K) at those places; the others as in `RawFactors`.

    members int64 has an entry for every `tokens` rows.
    """
    y = at(y_place, (last_row, a.shape[2]), a)
    x = at(x_place, (last_row, b.shape[3]), a)
    sums = np.empty(y.shape[1], np.float32)
    for i in range(first_row, last_row):
        member = members[i // tokens]
        row, given = y[i], x[i]
        if b.shape[2] == 1 and not bias.size:  # what there is most of, in one pass
            _add_one(row, given, a[member, 0], b[member], bounds)
            continue
        for c in range(sums.size):
            sums[c] = wide(row[c])
        if bias.size:
            shift = bias[member]
            for c in range(sums.size):
                sums[c] += wide(shift[c])
        for part in range(bounds.size - 1):
            first, last = bounds[part], bounds[part + 1]
            own = sums[first:last]  # views, since indices that might be negative keep a loop from vectors
            for k in range(b.shape[2]):
                left, right = b[member, part, k], a[member, k, first:last]
                dot = np.float32(0)
                for c in range(given.size):
                    dot += wide(given[c]) * wide(left[c])
                for c in range(own.size):
                    own[c] += dot * wide(right[c])
        for c in range(sums.size):
            row[c] = narrow(sums[c], row[c])


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _add_one(row, given, a, b, bounds):
    """A member's own, of rank 1: row (N,), given (K,), a (N,), b (parts, 1, K)."""
    for part in range(bounds.size - 1):
        first, last = bounds[part], bounds[part + 1]
        own, left, right = row[first:last], b[part, 0], a[first:last]
        dot = np.float32(0)
        for c in range(given.size):
            dot += wide(given[c]) * wide(left[c])
        for c in range(own.size):
            own[c] = narrow(wide(own[c]) + dot * wide(right[c]), own[c])


def knows(tensor: torch.Tensor) -> bool:
    """Is `add` made for a tensor of this device and dtype?"""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float32)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory: float32, or bfloat16's bits as uint16."""
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


def place(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Where a contiguous tensor's raw numbers are, which is quicker than an array of them.

    Raises TypeError for a tensor of another dtype, or with gaps.
    """
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise TypeError(f"a contiguous tensor of {dtype} is wanted, not {tensor.dtype}, {tensor.stride()}")
    return tensor.data_ptr()


def add(y: torch.Tensor, x: torch.Tensor, members: np.ndarray, noise: RawFactors, share: Share) -> None:
    """Add the low-rank products to y (R, ..., N), in place; x is (R, ..., K), members int64 (R,).

    y and x are contiguous, of the noise's dtype, which `knows` knows. `share` spreads the work over threads.
    """
    size, outputs, inputs = y.numel(), noise.a.shape[2], noise.b.shape[3]
    rows = size // outputs
    if y.shape[-1] != outputs or x.shape[-1] != inputs or x.numel() != rows * inputs:
        raise TypeError(f"y {tuple(y.shape)}, x {tuple(x.shape)} with noise of ({outputs}, {inputs})")
    if not rows:
        return
    y_place, x_place, tokens = place(y, noise.dtype), place(x, noise.dtype), rows // members.size

    def work(first, last):
        _add(y_place, x_place, first, last, tokens, members, noise.a, noise.b, noise.bounds, noise.bias)

    if size + rows * inputs < WORTH_SHARING:
        work(0, rows)
    else:
        share(rows, work)
