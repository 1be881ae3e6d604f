"""Noise on the CPU: numba kernels with the bits of `definition`, on NumPy arrays and one thread.

Within a kernel, a chunk's 512 numbers pass through buffers that stay in the first-level cache, and no
memory is allocated per member. numba must not fuse multiplications and additions: no `fastmath` here.
"""

from __future__ import annotations

import numpy as np

from mpies.noise import definition
from mpies.noise.compiling import njit
from mpies.noise.definition import CHUNK, LANES

# Module-level arrays become constants of the compiled code. As arguments, they might alias the
# output as far as the compiler knows, and the look-up would not be vectorised.
TABLE = definition.TABLE
SHIFT = np.uint16(16 - definition.TABLE_BITS)
M0, M1 = (np.uint64(m) for m in definition.PHILOX_MULTIPLIERS)
SPREAD = np.uint64(definition.DIGEST_SPREAD)
MIX0, MIX1 = (np.uint32(m) for m in definition.DIGEST_MIXERS)
ROUNDS = definition.PHILOX_ROUNDS
LOW = np.uint64(0xFFFFFFFF)
U32 = np.uint64(32)
STREAM = np.uint64(definition.STREAM_NOISE)
STREAM_ROUNDING = np.uint64(definition.STREAM_ROUNDING)
# Positions are unsigned throughout: a signed index could be negative for all the compiler knows, and
# Python's wrap-around for those would keep loops from being vectorised.
ZERO, LANES_, CHUNK_ = np.uint64(0), np.uint64(LANES), np.uint64(CHUNK)

# Live dtypes, as the kernels see them: raw 16-bit patterns or float32.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2


@njit(nogil=True, cache=True)
def _bits(words, first_block, parameter, stream, keys):
    """Fill `words` (4 * LANES uint32, word-major) with Philox output for LANES counters.

    The four words live in 64-bit lanes whose upper halves may hold rubbish: a vector unit's
    32 x 32 -> 64 multiplication ignores them.
    """
    for lane in range(LANES):
        block = first_block + np.uint64(lane)
        c0 = block & LOW
        c1 = block >> U32
        c2 = parameter
        c3 = stream
        for r in range(ROUNDS):
            p0 = (c0 & LOW) * M0
            p1 = (c2 & LOW) * M1
            c0 = (p1 >> U32) ^ c1 ^ keys[r, 0]
            c2 = (p0 >> U32) ^ c3 ^ keys[r, 1]
            c1 = p1
            c3 = p0
        words[lane] = np.uint32(c0 & LOW)
        words[LANES + lane] = np.uint32(c1 & LOW)
        words[2 * LANES + lane] = np.uint32(c2 & LOW)
        words[3 * LANES + lane] = np.uint32(c3 & LOW)


@njit(nogil=True, cache=True)
def to_bfloat16(bits):
    """Round a float32's bits to bfloat16, to nearest even, NaN staying NaN."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _to_float16(bits):
    """Round a float32's bits to float16, to nearest even, with subnormals, infinities and NaN."""
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return sign | np.uint16(0x7E00)
    if magnitude >= np.uint32(0x47800000):  # 2^16 and above
        return sign | np.uint16(0x7C00)
    if magnitude >= np.uint32(0x38800000):  # 2^-14 and above: a normal float16
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd
        return sign | np.uint16(rounded >> np.uint32(13))
    if magnitude < np.uint32(0x33000000):  # below half of the smallest subnormal, 2^-25
        return sign
    shift = np.uint32(126) - (magnitude >> np.uint32(23))
    mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    kept = mantissa >> shift
    rest = mantissa - (kept << shift)
    half = np.uint32(1) << (shift - np.uint32(1))
    if rest > half or (rest == half and (kept & np.uint32(1)) == np.uint32(1)):
        kept += np.uint32(1)
    return sign | np.uint16(kept)


@njit(nogil=True, cache=True)
def perturb(base, live, live_format, keys, parameter, scale, start):
    """live, raw, <- cast(base + scale * noise), from element `start` of the parameter on."""
    words = np.empty(4 * LANES, np.uint32)
    integers = words.view(np.uint16)
    first = np.uint64(start)
    size = np.uint64(base.size)
    done = ZERO
    while done < size:
        chunk = (first + done) // CHUNK_
        skip = (first + done) - chunk * CHUNK_
        count = min(CHUNK_ - skip, size - done)
        _bits(words, chunk * LANES_, parameter, STREAM, keys)
        if live_format == BFLOAT16:
            for e in range(count):
                value = np.float32(base[done + e] + scale * TABLE[integers[skip + e] >> SHIFT])
                live[done + e] = to_bfloat16(value.view(np.uint32))
        elif live_format == FLOAT32:
            for e in range(count):
                value = np.float32(base[done + e] + scale * TABLE[integers[skip + e] >> SHIFT])
                live[done + e] = value.view(np.uint32)
        else:
            for e in range(count):
                value = np.float32(base[done + e] + scale * TABLE[integers[skip + e] >> SHIFT])
                live[done + e] = _to_float16(value.view(np.uint32))
        done += count


@njit(nogil=True, cache=True)
def update(base, keys, coefficients, parameter, start):
    """base <- base + the sum over members of coefficient * noise."""
    words = np.empty(4 * LANES, np.uint32)
    integers = words.view(np.uint16)
    total = np.empty(CHUNK, np.float32)
    first = np.uint64(start)
    size = np.uint64(base.size)
    done = ZERO
    while done < size:
        chunk = (first + done) // CHUNK_
        skip = (first + done) - chunk * CHUNK_
        count = min(CHUNK_ - skip, size - done)
        total[:] = np.float32(0)
        for m in range(coefficients.size):
            _bits(words, chunk * LANES_, parameter, STREAM, keys[m])
            coefficient = coefficients[m]
            for e in range(CHUNK):
                total[e] += coefficient * TABLE[integers[e] >> SHIFT]
        for e in range(count):
            base[done + e] += total[skip + e]
        done += count


@njit(nogil=True, cache=True)
def normal(out, keys, parameter, stream, start):
    """out (M, count) <- numbers of a stream of each seed, from number `start` on."""
    words = np.empty(4 * LANES, np.uint32)
    integers = words.view(np.uint16)
    first = np.uint64(start)
    size = np.uint64(out.shape[1])
    for m in range(out.shape[0]):
        row = out[m]
        done = ZERO
        while done < size:
            chunk = (first + done) // CHUNK_
            skip = (first + done) - chunk * CHUNK_
            count = min(CHUNK_ - skip, size - done)
            _bits(words, chunk * LANES_, parameter, stream, keys[m])
            for e in range(count):
                row[done + e] = TABLE[integers[skip + e] >> SHIFT]
            done += count


@njit(nogil=True, cache=True)
def round_at_random(value, base, keys, parameter, start):
    """base <- value, both raw, rounded from float32 to bfloat16."""
    words = np.empty(4 * LANES, np.uint32)
    integers = words.view(np.uint16)
    first = np.uint64(start)
    size = np.uint64(value.size)
    done = ZERO
    while done < size:
        chunk = (first + done) // CHUNK_
        skip = (first + done) - chunk * CHUNK_
        count = min(CHUNK_ - skip, size - done)
        _bits(words, chunk * LANES_, parameter, STREAM_ROUNDING, keys)
        for e in range(count):
            bits = value[done + e]
            if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                base[done + e] = np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
            else:
                base[done + e] = np.uint16((bits + np.uint32(integers[skip + e])) >> np.uint32(16))
        done += count


@njit(nogil=True, cache=True)
def digest(patterns, parameter, start):
    """The sum modulo 2^64 of every pattern times the weight of its position."""
    total = np.uint64(0)
    done = 0
    while done < patterns.size:
        # Spans that share the upper half of the position, so that the inner loop is 32-bit only.
        position = np.uint64(start + done)
        count = min(patterns.size - done, 2**32 - np.int64(position & LOW))
        salt = parameter ^ np.uint32((position >> U32) * SPREAD)
        first = np.uint32(position & LOW)
        span = patterns[done : done + count]
        for e in range(count):
            w = np.uint32(first + np.uint32(e)) ^ salt
            w = np.uint32((w ^ (w >> np.uint32(16))) * MIX0)
            w = np.uint32((w ^ (w >> np.uint32(13))) * MIX1)
            w = (w ^ (w >> np.uint32(16))) | np.uint32(1)
            total += np.uint64(w) * np.uint64(span[e])
        done += count
    return total
