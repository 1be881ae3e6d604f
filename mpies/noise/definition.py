"""The definition of noise, in plain NumPy. Slow on purpose: it is what the kernels are tested against.

`normal(seed, parameter, start, count)` is made in three steps.

1. Bits: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with
   key     = (low half of the seed, high half of the seed)
   counter = (low half of the block number, high half, parameter id, stream).
   One call gives four 32-bit words, hence eight 16-bit integers.
2. Order: elements are taken in chunks of 512 = 64 counters x 8 integers. Within a chunk, the first 128
   elements use word 0 of the 64 counters, two integers each (low half first), the next 128 word 1,
   and so on: neighbours in memory come from neighbouring counters, which suits vector units and GPUs.
3. Normal: the integer's upper 13 bits index `TABLE`, the 8192 mid-point quantiles of the normal
   distribution, scaled to variance 1 and rounded to multiples of 2^-22. |z| <= 3.84. The 16 kB of the
   table's upper half stay in a first-level cache, which a 16-bit table does not (it was half as fast).

Every step is exact integer arithmetic or a table look-up. What the kernels add, `base + scale * z` and
`sum += coefficient * z`, is one float32 multiplication and one float32 addition, each rounded to
nearest and never fused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LANES = 64
CHUNK = 8 * LANES
TABLE_BITS = 13

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

# Streams: the counter's last word. Different uses of one seed never share numbers.
STREAM_NOISE = 0
STREAM_SEEDS = 1
STREAM_A, STREAM_B = 2, 3
STREAM_PROMPTS = 4  # the order of the prompts in an epoch
STREAM_PROBLEMS = 5  # problems that a task makes up
STREAM_ANSWERS = 6  # the tokens of sampled answers
STREAM_ROUNDING = 7  # of updated weights to the live dtype (model.master=live)
STREAM_ENVIRONMENTS = 8  # the seeds that environments draw from

DIGEST_SPREAD = 0x9E3779B1
# The two multipliers of MurmurHash3's 32-bit finaliser.
DIGEST_MIXERS = (0x85EBCA6B, 0xC2B2AE35)

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def _normal_table() -> np.ndarray:
    half = 2 ** (TABLE_BITS - 1)
    quantile = NormalDist().inv_cdf
    upper = [quantile(0.5 + (k + 0.5) / (2 * half)) for k in range(half)]
    deviation = math.sqrt(math.fsum(z * z for z in upper) / half)
    # Rounding to a coarse grid makes the table independent of the last bit of a platform's logarithm.
    upper = [round(z / deviation * 2**22) / 2**22 for z in upper]
    return np.array([-z for z in reversed(upper)] + upper, dtype=np.float32)


TABLE = _normal_table()
TABLE.setflags(write=False)


def parameter_id(name: str) -> int:
    """The 32-bit id of a parameter: the head of the SHA-256 of its Hugging Face state-dict name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def round_keys(seed: int) -> np.ndarray:
    """Philox's key schedule for a seed: shape (10, 2), uint64 values below 2^32."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    schedule = [[(key[i] + r * PHILOX_WEYL[i]) & 0xFFFFFFFF for i in (0, 1)] for r in range(PHILOX_ROUNDS)]
    return np.array(schedule, dtype=np.uint64)


def philox(seed: int, block: np.ndarray, parameter: int | np.ndarray, stream: int) -> np.ndarray:
    """Philox4x32-10 words, shape (4, len(block)), uint32, for 64-bit block numbers `block`."""
    block = np.asarray(block, dtype=np.uint64)
    c0, c1 = block & _LOW, block >> _32
    c2 = np.full_like(block, parameter)
    c3 = np.full_like(block, stream)
    m0, m1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
    for k0, k1 in round_keys(seed):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def integers(seed: int, parameter: int, start: int, count: int, stream: int) -> np.ndarray:
    """Steps 1 and 2: uniform integers below 2^16, uint32 (count,), for elements [start, start + count)."""
    first, last = start // CHUNK, -(-(start + count) // CHUNK)
    blocks = np.arange(first * LANES, last * LANES, dtype=np.uint64)
    words = philox(seed, blocks, parameter, stream).reshape(4, -1, LANES)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    in_order = halves.transpose(1, 0, 2, 3).reshape(-1)
    offset = start - first * CHUNK
    return in_order[offset : offset + count]


def normal(seed: int, parameter: int, start: int, count: int, stream: int = STREAM_NOISE) -> np.ndarray:
    """Elements [start, start + count) of a parameter's noise for a seed: float32, shape (count,)."""
    return TABLE[integers(seed, parameter, start, count, stream) >> (16 - TABLE_BITS)]


def perturbed(base: np.ndarray, seed: int, parameter: int, scale: float, start: int = 0) -> np.ndarray:
    """base + scale * noise, float32; each operation rounded once. The cast to the live dtype follows."""
    return base + np.float32(scale) * normal(seed, parameter, start, base.size)


def updated(
    base: np.ndarray, seeds: np.ndarray, coefficients: np.ndarray, parameter: int, start: int = 0
) -> np.ndarray:
    """base + sum_i coefficients_i * noise(seeds_i): float32 sum in the order given, then one addition."""
    total = np.zeros_like(base)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        total += np.float32(coefficient) * normal(int(seed), parameter, start, base.size)
    return base + total


def matrices_in(shape: Sequence[int]) -> int:
    """How many matrices with factors of their own a parameter of this shape is; 0: its noise is full.

    One with two dimensions is a matrix, one with three a stack of as many as its first dimension says, such
    as experts; but what has a single row or column there is no matrix, such as a convolution of each channel.
    """
    if len(shape) == 2:
        return 1
    return shape[0] if len(shape) == 3 and min(shape[1:]) > 1 else 0


def factors(
    seed: int, parameter: int, shape: tuple[int, int], rank: int, matrix: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank noise of a matrix: A (rank, rows) and B (rank, columns), float32, standard normal.

    The matrix's noise is E = A^T B / sqrt(rank) (EGGROLL, arXiv 2511.16652): variance 1, rank `rank`.
    `matrix`: which one it is of a parameter that is a stack of them. Their factors follow one another.
    """
    rows, columns = shape
    a = normal(seed, parameter, matrix * rank * rows, rank * rows, STREAM_A).reshape(rank, rows)
    b = normal(seed, parameter, matrix * rank * columns, rank * columns, STREAM_B).reshape(rank, columns)
    return a, b


def lowrank_updated(
    base: np.ndarray, seeds: np.ndarray, coefficients: np.ndarray, parameter: int, rank: int, matrix: int = 0
) -> np.ndarray:
    """base + sum_i coefficients_i * E(seeds_i), for a matrix (rows, columns).

    With c_i = float32(coefficient_i / sqrt(rank)), every term (c_i * A[k, row]) * B[k, column] is two
    float32 products; they are summed over i, then k, in that order, and added to the base once.
    """
    total = np.zeros_like(base)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        a, b = factors(int(seed), parameter, base.shape, rank, matrix)
        scale = np.float32(float(coefficient) / math.sqrt(rank))
        for k in range(rank):
            total += (scale * a[k])[:, None] * b[k]
    return base + total


def rounded(value: np.ndarray, seed: int, parameter: int, start: int = 0) -> np.ndarray:
    """float32 values rounded to bfloat16 at random, up or down, so that the mean is kept: bits, uint16.

    A value goes to the neighbour further from zero with the probability of its distance from the other
    one, in neighbours' distances: its bits plus an integer of 16 random bits, cut off.
    """
    bits = value.view(np.uint32)
    up = (bits + integers(seed, parameter, start, value.size, STREAM_ROUNDING)) >> np.uint32(16)
    return np.where(np.isnan(value), bits >> np.uint32(16) | np.uint32(0x40), up).astype(np.uint16)


def digest_weights(position: np.ndarray, parameter: int) -> np.ndarray:
    """The odd 32-bit weights that the digest gives to positions (uint64) of a parameter."""
    upper = (position >> _32) * np.uint64(DIGEST_SPREAD)
    w = ((position ^ upper) & _LOW).astype(np.uint32) ^ np.uint32(parameter)
    w = (w ^ (w >> np.uint32(16))) * np.uint32(DIGEST_MIXERS[0])
    w = (w ^ (w >> np.uint32(13))) * np.uint32(DIGEST_MIXERS[1])
    return (w ^ (w >> np.uint32(16))) | np.uint32(1)


def digest(base: np.ndarray, parameter: int, start: int = 0) -> int:
    """A 64-bit digest of float32 `base` (flat), to be added modulo 2^64 over slices and parameters.

    It is the sum of every element's 32 bits times an odd 32-bit weight hashed from its position: order
    does not matter, and a change in a single element always changes the sum.
    """
    position = np.arange(start, start + base.size, dtype=np.uint64)
    weights = digest_weights(position, parameter).astype(np.uint64)
    return int(np.add.reduce(weights * base.view(np.uint32), dtype=np.uint64))
