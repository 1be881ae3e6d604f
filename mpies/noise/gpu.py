"""Noise on a GPU: Triton kernels with the bits of `definition`.

A program works on `CHUNKS` chunks: its Philox words never leave the registers, a number costs one
look-up in the table, which stays in the first-level cache, and the base is read and written once per
tensor, however many members there are. Both updates have a better kernel where Triton has Gluon, in which
layouts are chosen by hand: `gpu_update`, `gpu_lowrank`. Launched with `enable_fp_fusion=False`: a fused
multiplication and addition would round once instead of twice.

Integers that are given have the types that their annotations say, whatever their values: otherwise
Triton compiles a kernel anew for a seed with a top bit, in the middle of a run.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from mpies.noise import definition
from mpies.noise.factors import scaled_factors
from mpies.noise.uploads import table, uploaded

LANES = tl.constexpr(definition.LANES)
CHUNK = tl.constexpr(definition.CHUNK)
WORD = tl.constexpr(2 * definition.LANES)  # elements that one of Philox's four words makes in a chunk
SHIFT = tl.constexpr(16 - definition.TABLE_BITS)
ROUNDS = tl.constexpr(definition.PHILOX_ROUNDS)
ROUNDING = tl.constexpr(definition.STREAM_ROUNDING)
M0, M1 = (tl.constexpr(m) for m in definition.PHILOX_MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in definition.PHILOX_WEYL)
SPREAD = tl.constexpr(definition.DIGEST_SPREAD)
MIX0, MIX1 = (tl.constexpr(m) for m in definition.DIGEST_MIXERS)
LOW = tl.constexpr(0xFFFFFFFF)

CHUNKS = 2  # per program
SPAN = 4096  # elements per program of the digest
TILE = 64  # rows and columns per program of the low-rank update without Gluon
THREADS = CHUNKS * definition.LANES  # a counter each
ROWS = 65535  # of a grid, at most


@triton.jit
def _words(chunk, low, high, parameter, stream):
    """Philox4x32-10 for the lanes of the chunks, int64 (C,): four words, uint32 (C, LANES).

    `low` and `high` are the seed's halves.
    """
    block = chunk[:, None] * LANES + tl.arange(0, LANES)[None, :]
    c0 = (block & LOW).to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + parameter.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    k0, k1 = low.to(tl.uint32), high.to(tl.uint32)
    m0 = tl.full((1, 1), M0, tl.uint32)
    m1 = tl.full((1, 1), M1, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += tl.full((), W0, tl.uint32)
        k1 += tl.full((), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _numbers(table, word):
    """The numbers that a word makes, float32 (C, WORD): low halves at even, high halves at odd places."""
    low = tl.load(table + ((word & 0xFFFF) >> SHIFT))
    high = tl.load(table + (word >> (16 + SHIFT)))
    return tl.interleave(low, high)


@triton.jit
def _place(chunk, word: tl.constexpr):
    """Positions in the tensor of the elements that a chunk's word makes: int64 (C, WORD)."""
    return chunk[:, None] * CHUNK + word * WORD + tl.arange(0, WORD)[None, :]


@triton.jit
def _chunks(start, count: tl.constexpr):
    """The numbers of this program's chunks, int64 (count,), of a tensor's slice that begins at `start`."""
    return start // CHUNK + tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)


@triton.jit
def _to_bfloat16(value):
    """A float32 rounded to bfloat16, to nearest even: its bits, int16. Not every compiler rounds so."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, (bits >> 16) | 0x40).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit(do_not_specialize=["size", "low", "high", "parameter", "start"])
def _perturb(
    base, live, table, size: tl.int64, low: tl.uint32, high: tl.uint32, parameter: tl.uint32,
    scale, start: tl.int64, count: tl.constexpr,
):  # fmt: skip
    chunk = _chunks(start, count)
    words = _words(chunk, low, high, parameter, tl.full((), 0, tl.uint32))
    for w in tl.static_range(4):
        place = _place(chunk, w) - start
        inside = (place >= 0) & (place < size)
        value = tl.load(base + place, inside) + scale * _numbers(table, words[w])
        if live.dtype.element_ty == tl.int16:
            tl.store(live + place, _to_bfloat16(value), inside)
        else:
            tl.store(live + place, value.to(live.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["size", "directions", "parameter", "start"])
def _update(
    base, table, seeds, coefficients, directions: tl.int32, size: tl.int64, parameter: tl.uint32,
    start: tl.int64, count: tl.constexpr,
):  # fmt: skip
    chunk = _chunks(start, count)
    stream = tl.full((), 0, tl.uint32)
    zeros = tl.zeros((count, WORD), tl.float32)
    t0, t1, t2, t3 = zeros, zeros, zeros, zeros
    for d in range(directions):
        coefficient = tl.load(coefficients + d)
        seed = tl.load(seeds + d)
        w0, w1, w2, w3 = _words(chunk, seed & LOW, (seed >> 32) & LOW, parameter, stream)
        t0 += coefficient * _numbers(table, w0)
        t1 += coefficient * _numbers(table, w1)
        t2 += coefficient * _numbers(table, w2)
        t3 += coefficient * _numbers(table, w3)
    totals = (t0, t1, t2, t3)
    for w in tl.static_range(4):
        place = _place(chunk, w) - start
        inside = (place >= 0) & (place < size)
        tl.store(base + place, tl.load(base + place, inside) + totals[w], inside)


@triton.jit(do_not_specialize=["size", "parameter", "stream", "start"])
def _normal(
    out, table, seeds, size: tl.int64, parameter: tl.uint32, stream: tl.uint32, start: tl.int64,
    count: tl.constexpr,
):  # fmt: skip
    chunk = _chunks(start, count)
    member = tl.program_id(1).to(tl.int64)
    seed = tl.load(seeds + member)
    words = _words(chunk, seed & LOW, (seed >> 32) & LOW, parameter, stream)
    for w in tl.static_range(4):
        place = _place(chunk, w) - start
        inside = (place >= 0) & (place < size)
        tl.store(out + member * size + place, _numbers(table, words[w]), inside)


@triton.jit(do_not_specialize=["terms", "rows", "columns", "stride"])
def _lowrank_update(
    base, a, b, terms: tl.int32, rows: tl.int64, columns: tl.int64, stride: tl.int64, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    column = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    total = tl.zeros((tile, tile), tl.float32)
    for _ in range(terms):
        left, right = tl.load(a + row, row < rows), tl.load(b + column, column < columns)
        total += left[:, None] * right[None, :]
        a += rows
        b += columns
    place = row[:, None] * stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(base + place, tl.load(base + place, inside) + total, inside)


@triton.jit(do_not_specialize=["size", "low", "high", "parameter", "start"])
def _round(
    value, base, size: tl.int64, low: tl.uint32, high: tl.uint32, parameter: tl.uint32,
    start: tl.int64, count: tl.constexpr,
):  # fmt: skip
    chunk = _chunks(start, count)
    words = _words(chunk, low, high, parameter, tl.full((), ROUNDING, tl.uint32))
    for w in tl.static_range(4):
        place = _place(chunk, w) - start
        inside = (place >= 0) & (place < size)
        given = tl.load(value + place, inside)
        bits = given.to(tl.uint32, bitcast=True)
        random = tl.interleave(words[w] & 0xFFFF, words[w] >> 16)
        up = tl.where(given == given, bits + random, bits | 0x400000) >> 16
        tl.store(base + place, up.to(tl.uint16).to(tl.int16, bitcast=True), inside)


@triton.jit(do_not_specialize=["size", "parameter", "start"])
def _digest(
    patterns, out, size: tl.int64, parameter: tl.uint32, start: tl.int64, span: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * span + tl.arange(0, span)
    position = start + place
    spread = (position >> 32).to(tl.uint32) * tl.full((), SPREAD, tl.uint32)
    w = (position & LOW).to(tl.uint32) ^ spread ^ parameter.to(tl.uint32)
    w = (w ^ (w >> 16)) * tl.full((), MIX0, tl.uint32)
    w = (w ^ (w >> 13)) * tl.full((), MIX1, tl.uint32)
    w = (w ^ (w >> 16)) | 1
    bits = tl.load(patterns + place, place < size, other=0).to(tl.uint32, bitcast=True)
    tl.atomic_add(out, tl.sum((w.to(tl.uint64) * bits.to(tl.uint64)).to(tl.int64)))


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = 4) -> None:
    """On the GPU of the first argument, a tensor: Triton would take the current one. Nothing is fused."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)


def _launch_on_counters(kernel, grid: tuple[int, ...], *arguments) -> None:
    """With a thread for each of a program's counters: were there more, they would compute the same."""
    launch(kernel, grid, *arguments, num_warps=THREADS // _threads_of_a_warp())


@functools.cache
def _target() -> Any:
    """What Triton compiles for, its `GPUTarget`; None in its interpreter, without a GPU."""
    compiles = isinstance(_perturb, triton.JITFunction)
    return triton.runtime.driver.active.get_current_target() if compiles else None


def _threads_of_a_warp() -> int:
    """32 on NVIDIA's GPUs, 64 on most of AMD's."""
    return _target().warp_size if _target() else 32


def _has_gluon() -> bool:
    """Has Triton a Gluon that our two kernels were tried with? It is experimental, and changes."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _target() is not None and (3, 7) <= version <= (3, 9)


def _shares_table() -> bool:
    """Is `gpu_update` better? On AMD's GPUs two tables fill a unit's memory, so that few programs run."""
    return _has_gluon() and _target().backend == "cuda"


def _programs(size: int, start: int = 0) -> int:
    chunks = -(-(start + size) // definition.CHUNK) - start // definition.CHUNK
    return -(-chunks // CHUNKS)


class GpuKernels:
    """The kernel set for GPUs that Triton compiles for."""

    def perturb(self, base, live, seed, parameter, scale, start=0):
        """live <- cast(base + scale * noise). Flat contiguous tensors; base float32, live any float."""
        if base.numel():
            live = live.view(torch.int16) if live.dtype == torch.bfloat16 else live
            _launch_on_counters(
                _perturb, (_programs(base.numel(), start),),
                base, live, table(base.device), base.numel(), *_halves(seed), parameter,
                float(np.float32(scale)), start, CHUNKS,
            )  # fmt: skip

    def update(self, base, seeds, coefficients, parameter, start=0):
        """base += sum_i coefficients_i * noise(seeds_i), summed in float32 in the order given."""
        if base.numel():
            coefficients = uploaded(np.asarray(coefficients, np.float32), base.device)
            raw = _raw_seeds(seeds, base.device)
            if _shares_table():
                from mpies.noise import gpu_update

                gpu_update.add_noise(base, raw, coefficients, parameter, start, launch, _threads_of_a_warp())
                return
            _launch_on_counters(
                _update, (_programs(base.numel(), start),),
                base, table(base.device), raw, coefficients, len(seeds), base.numel(), parameter, start,
                CHUNKS,
            )  # fmt: skip

    def normal(self, count, seeds, parameter, stream, device, start=0):
        """`count` numbers of a stream of each seed, from `start` on: float32 (M, count)."""
        out = torch.empty(len(seeds), count, dtype=torch.float32, device=device)
        if out.numel():
            raw = _raw_seeds(seeds, device)
            for rows, some in zip(out.split(ROWS), raw.split(ROWS), strict=True):
                grid = _programs(count, start), len(some)
                _launch_on_counters(
                    _normal, grid, rows, table(out.device), some, count, parameter, stream, start, CHUNKS
                )
        return out

    def lowrank_update(self, base, seeds, coefficients, parameter, rank, matrix=0):
        """base += sum_i coefficients_i * E(seeds_i) for a matrix; see `definition.lowrank_updated`."""
        for tile in scaled_factors(self, base, seeds, coefficients, parameter, rank, matrix):
            (terms, rows), columns = tile.a.shape, tile.b.shape[1]
            target = base[tile.row :, tile.column :]
            if _has_gluon():
                from mpies.noise import gpu_lowrank

                gpu_lowrank.add_products(target, tile.a, tile.b, launch, _threads_of_a_warp())
                continue
            grid = -(-rows // TILE), -(-columns // TILE)
            launch(
                _lowrank_update, grid,
                target, tile.a, tile.b, terms, rows, columns, base.shape[1], TILE,
            )  # fmt: skip

    def digest(self, base, parameter, start=0):
        """The base's digest: int64 (), on its device; add over slices and parameters modulo 2^64."""
        total = torch.zeros((), dtype=torch.int64, device=base.device)
        if base.numel():
            programs = -(-base.numel() // SPAN)
            patterns = base.view(torch.int32)
            launch(_digest, (programs,), patterns, total, base.numel(), parameter, start, SPAN)
        return total

    def round(self, value, base, seed, parameter, start=0):
        """base <- value, rounded at random; see `definition.rounded`. Flat; float32 to bfloat16."""
        if value.numel():
            _launch_on_counters(
                _round, (_programs(value.numel(), start),),
                value, base.view(torch.int16), value.numel(), *_halves(seed), parameter,
                start, CHUNKS,
            )  # fmt: skip


def _halves(seed: int) -> tuple[int, int]:
    """Low and high; plain integers, which Triton's launchers want."""
    return int(seed) & 0xFFFFFFFF, int(seed) >> 32


def _raw_seeds(seeds, device: torch.device) -> torch.Tensor:
    """Seeds below 2^64 as int64 with the same bits."""
    return uploaded(np.asarray(seeds, dtype=np.uint64).view(np.int64), device)
