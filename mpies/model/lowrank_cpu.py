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
from numba import types
from numba.extending import overload

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
        return cls(raw(a), raw(b), edges, shifts)


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


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _add(y, x, members, a, b, bounds, bias, tokens, start):
    """Raw: y (T, N), x (T, K); the others as in `RawFactors`.

    Row i is token start + i of a batch; members int64 has an entry for every `tokens` tokens.
    """
    sums = np.empty(y.shape[1], np.float32)
    for i in range(y.shape[0]):
        member = members[(start + i) // tokens]
        row, given = y[i], x[i]
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


def knows(tensor: torch.Tensor) -> bool:
    """Is `add` made for a tensor of this device and dtype?"""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float32)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory: float32, or bfloat16's bits as uint16."""
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


def add(y: torch.Tensor, x: torch.Tensor, members: np.ndarray, noise: RawFactors, share: Share) -> None:
    """Add the low-rank products to y (R, ..., N), in place; x is (R, ..., K), members int64 (R,).

    y and x are contiguous, of the noise's dtype, which `knows` knows. `share` spreads the work over threads.
    """
    target, given = raw(y).reshape(-1, y.shape[-1]), raw(x).reshape(-1, x.shape[-1])
    rows = len(target)
    if not rows:
        return
    tokens = rows // len(members)

    def work(first, last):
        _add(
            target[first:last], given[first:last], members, noise.a, noise.b, noise.bounds, noise.bias,
            tokens, first,
        )  # fmt: skip

    if target.size + given.size < WORTH_SHARING:
        work(0, rows)
    else:
        share(rows, work)
