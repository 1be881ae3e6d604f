"""The low-rank update on a GPU, with layouts chosen by hand, where Triton has Gluon for that.

Of a tile, a thread has `TALL` x `WIDE` elements in a block, so that a term costs it two products and sums for
each, which nothing can spare, and a few loads of four numbers: each is used `TALL` or `WIDE` times. Triton by
itself spreads a thread's elements, and loads them one by one.
"""

from __future__ import annotations

import torch
import triton.language as tl  # Triton knows its own names for types only
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TALL, WIDE = 16, 4  # elements of a thread
ACROSS, WARPS = 16, 4  # threads of a warp beside each other, and warps above each other
TOGETHER = 4  # terms: the loop's own instructions are once for so many
COLUMNS = WIDE * ACROSS


@gluon.jit(do_not_specialize=["terms", "rows", "columns", "stride"])
def _lowrank_update(
    base, a, b, terms: tl.int32, rows: tl.int64, columns: tl.int64, stride: tl.int64,
    tall: gl.constexpr, wide: gl.constexpr, down: gl.constexpr, across: gl.constexpr, warps: gl.constexpr,
    together: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([tall, wide], [down, across], [warps, 1], [1, 0])
    high: gl.constexpr = tall * down * warps
    broad: gl.constexpr = wide * across
    row = gl.program_id(0).to(gl.int64) * high + gl.arange(0, high, gl.SliceLayout(1, layout))
    column = gl.program_id(1).to(gl.int64) * broad + gl.arange(0, broad, gl.SliceLayout(0, layout))
    # The factors are padded, to whole tiles and with terms of zeros: a sum that began with 0 is never -0, so
    # that another 0 leaves its bits.
    left, right = a + row, b + column
    height, width = (rows + high - 1) // high * high, (columns + broad - 1) // broad * broad
    total = gl.zeros([high, broad], gl.float32, layout)
    for _ in range(0, terms, together):
        for _ in gl.static_range(together):
            total += gl.load(left)[:, None] * gl.load(right)[None, :]
            left += height
            right += width
    place = row[:, None] * stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gl.store(base + place, gl.load(base + place, inside, other=0.0) + total, inside)


def add_products(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, launch, threads: int) -> None:
    """base (R, C) += sum_t a_t b_t^T, for a (T, R), b (T, C), in order; `base` may be a part of a matrix.

    `launch` as `gpu.launch`; `threads`: of a warp.
    """
    (terms, rows), columns = a.shape, b.shape[1]
    down = threads // ACROSS
    high = TALL * down * WARPS
    grid = -(-rows // high), -(-columns // COLUMNS)
    more = -terms % TOGETHER
    whole = pad(a, (0, grid[0] * high - rows, 0, more)), pad(b, (0, grid[1] * COLUMNS - columns, 0, more))
    launch(
        _lowrank_update, grid, base, *whole, terms, rows, columns, base.stride(0),
        TALL, WIDE, down, ACROSS, WARPS, TOGETHER, num_warps=WARPS,
    )  # fmt: skip
