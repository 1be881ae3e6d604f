"""The update on a GPU, with its table in shared memory, where Triton has Gluon for that.

What bounds the update is the look-ups: in the first-level cache, a warp's 32 places in the table are some
thirty lines, at several cycles for four of them; in shared memory, whose banks answer side by side, they take
three or four cycles. A program loads the table once for several groups of chunks. The numbers and their order
are those of `gpu._update`.
"""

from __future__ import annotations

import torch
import triton.language as tl  # Triton knows its own names for types only
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mpies.noise import definition
from mpies.noise.uploads import table

M0, M1 = (gl.constexpr(m) for m in definition.PHILOX_MULTIPLIERS)
W0, W1 = (gl.constexpr(w) for w in definition.PHILOX_WEYL)
ROUNDS = gl.constexpr(definition.PHILOX_ROUNDS)
LANES = gl.constexpr(definition.LANES)
CHUNK = gl.constexpr(definition.CHUNK)
WORD = gl.constexpr(2 * definition.LANES)
SHIFT = gl.constexpr(16 - definition.TABLE_BITS)
ENTRIES = gl.constexpr(2**definition.TABLE_BITS)
LOW = gl.constexpr(0xFFFFFFFF)

CHUNKS = 4  # of a program at a time, a thread for each counter
GROUPS = 8  # so many times at most; once only, where there would be fewer programs than keep a GPU busy
BUSY = 1024


@gluon.jit
def _words(c0, c1, parameter, low, high):
    """Philox4x32-10 of noise: counters and key, uint32, to four words; as `gpu._words`."""
    c2 = gl.zeros_like(c0) + parameter.to(gl.uint32)
    c3 = gl.zeros_like(c0)
    k0, k1 = low, high
    for _ in gl.static_range(ROUNDS):
        m0, m1 = gl.full_like(c0, M0), gl.full_like(c0, M1)
        high0, high1 = gl.umulhi(c0, m0), gl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@gluon.jit
def _low(numbers, word):
    return numbers.gather(((word & 0xFFFF) >> SHIFT).to(gl.int32), 0)


@gluon.jit
def _high(numbers, word):
    return numbers.gather((word >> (16 + SHIFT)).to(gl.int32), 0)


@gluon.jit(do_not_specialize=["size", "directions", "parameter", "start", "groups"])
def _update(
    base, table, seeds, coefficients, directions: tl.int32, size: tl.int64, parameter: tl.uint32,
    start: tl.int64, groups: tl.int32, count: gl.constexpr, threads: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    loading: gl.constexpr = gl.BlockedLayout([4], [threads], [warps], [0])
    layout: gl.constexpr = gl.BlockedLayout([1], [threads], [warps], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.float32, [ENTRIES], shared)
    numbers.store(gl.load(table + gl.arange(0, ENTRIES, loading)))
    gl.barrier()  # once: the compiler would put it into the loop
    lane = gl.arange(0, count * LANES, layout)
    for group in range(groups):
        chunk = start // CHUNK + (gl.program_id(0).to(gl.int64) * groups + group) * count
        block = chunk * LANES + lane
        c0, c1 = (block & LOW).to(gl.uint32), (block >> 32).to(gl.uint32)
        zeros = gl.zeros([count * LANES], gl.float32, layout)
        t0, t1, t2, t3, t4, t5, t6, t7 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
        for d in range(directions):
            coefficient = gl.load(coefficients + d)
            seed = gl.load(seeds + d)
            low, high = (seed & LOW).to(gl.uint32), ((seed >> 32) & LOW).to(gl.uint32)
            w0, w1, w2, w3 = _words(c0, c1, parameter, low, high)
            t0 += coefficient * _low(numbers, w0)
            t1 += coefficient * _high(numbers, w0)
            t2 += coefficient * _low(numbers, w1)
            t3 += coefficient * _high(numbers, w1)
            t4 += coefficient * _low(numbers, w2)
            t5 += coefficient * _high(numbers, w2)
            t6 += coefficient * _low(numbers, w3)
            t7 += coefficient * _high(numbers, w3)
        totals = (t0, t1, t2, t3, t4, t5, t6, t7)
        first = (chunk + lane // LANES) * CHUNK + lane % LANES * 2 - start
        for t in gl.static_range(8):
            place = first + t // 2 * WORD + t % 2
            inside = (place >= 0) & (place < size)
            gl.store(base + place, gl.load(base + place, inside, other=0.0) + totals[t], inside)


def add_noise(
    base: torch.Tensor,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    parameter: int,
    start: int,
    launch,
    threads: int,
) -> None:
    """base += sum_d coefficient_d * noise(seeds_d), in their order; flat float32, int64 (D,), float32 (D,).

    `launch` as `gpu.launch`; `threads`: of a warp.
    """
    chunks = -(-(start + len(base)) // definition.CHUNK) - start // definition.CHUNK
    groups = min(GROUPS, max(1, chunks // (CHUNKS * BUSY)))
    warps = CHUNKS * definition.LANES // threads
    launch(
        _update, (-(-chunks // (CHUNKS * groups)),),
        base, table(base.device), seeds, coefficients, len(seeds), len(base), parameter, start,
        groups, CHUNKS, threads, warps, num_warps=warps,
    )  # fmt: skip
