"""A block's low-rank products on a CPU, fused: y_i += sum_k (x_i . b_mk) a_mk, m being row i's member.

As two small matrix products the same takes several times as long: each call copies an operand, and
computes every member's products for every row. Sums are in float32 and y is rounded once. As with any
matrix product, the last bits depend on the processor, but on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mpies.noise.compiling import njit
from mpies.noise.cpu_kernels import to_bfloat16

# The order of a sum's terms is the compiler's; infinities and NaN stay what they are.
LOOSE = {"reassoc", "contract", "nsz"}
SIXTEEN = np.uint32(16)


# Work for more than one thread, in elements of x and y.
WORTH_SHARING = 2**18


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _add(y, x, members, a, b, rank, tokens, start):
    """Raw bits: y (T, N), x (T, K), a (M rank, N), b (M rank, K) uint16.

    Row i is token start + i of a batch; members int64 has an entry for every `tokens` tokens.
    """
    sums = np.empty(y.shape[1], np.float32)
    for i in range(y.shape[0]):
        first = members[(start + i) // tokens] * rank
        row, given = y[i], x[i]
        for c in range(sums.size):
            sums[c] = np.uint32(np.uint32(row[c]) << SIXTEEN).view(np.float32)
        for k in range(first, first + rank):
            left, right = b[k], a[k]
            dot = np.float32(0)
            for c in range(given.size):
                u = np.uint32(np.uint32(given[c]) << SIXTEEN).view(np.float32)
                v = np.uint32(np.uint32(left[c]) << SIXTEEN).view(np.float32)
                dot += u * v
            for c in range(sums.size):
                sums[c] += dot * np.uint32(np.uint32(right[c]) << SIXTEEN).view(np.float32)
        for c in range(sums.size):
            row[c] = to_bfloat16(np.float32(sums[c]).view(np.uint32))


def knows(tensor: torch.Tensor) -> bool:
    """Is `add` made for a tensor of this device and dtype?"""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous bfloat16 tensor's memory, in rows of its last dimension: uint16 (..., size)."""
    return tensor.view(torch.int16).numpy().view(np.uint16).reshape(-1, tensor.shape[-1])


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    members: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    rank: int,
    share: Callable[[int, Callable[[int, int], None]], None],
) -> None:
    """Add the low-rank products to y (R, ..., N), in place; x is (R, ..., K), members int64 (R,).

    y and x are contiguous bfloat16; a (M rank, N) and b (M rank, K) are `raw`. `share(count, work)`
    calls work(first, last) on parts of a count, on several threads.
    """
    target, given = raw(y), raw(x)
    rows = len(target)
    tokens = rows // len(members)

    def work(first, last):
        _add(target[first:last], given[first:last], members, a, b, rank, tokens, first)

    if target.size + given.size < WORTH_SHARING:
        work(0, rows)
    else:
        share(rows, work)
