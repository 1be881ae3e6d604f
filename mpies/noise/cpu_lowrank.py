"""The low-rank update on a CPU: a tile's sums of products, which stay in registers until they are complete.

A matrix product would do the same work, but fuses and reorders its terms; here each is a product and a sum,
each rounded, in the definition's order. Vectors are written out for LLVM, which does not keep a loop's array
in registers: the sums of SUMS_OF rows and SUMS_WIDE columns, to which a term adds a number of each row times
a vector of the columns. Both factors are packed first, so that the loop over terms reads them in order.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch.nn import functional

from mpies.noise.compiling import njit

# Registers of 16 numbers are 32; of 8 (AVX2), 16, and of 4 (Neon), 32. Half of them or more hold sums.
WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8
VECTORS = 2
SUMS_OF = 8 if WIDE else 4
SUMS_WIDE = VECTORS * LANES

NUMBER, INTEGER, LANE = ir.FloatType(), ir.IntType(64), ir.IntType(32)
VECTOR = ir.VectorType(NUMBER, LANES)


def _at(builder, start, numbers: int, kind):
    """A pointer, `numbers` float32 behind an address."""
    address = builder.add(start, ir.Constant(INTEGER, 4 * numbers))
    return builder.inttoptr(address, kind.as_pointer())


def _in_all_lanes(builder, number):
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.Constant(LANE, 0))
    first = ir.Constant(ir.VectorType(LANE, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), first)


def _with_term(builder, sums, a, b):
    """The sums and a term's products; at a and b are its SUMS_OF and SUMS_WIDE numbers."""
    vectors = [builder.load(_at(builder, b, v * LANES, VECTOR), align=4) for v in range(VECTORS)]
    added = []
    for r in range(SUMS_OF):
        factor = _in_all_lanes(builder, builder.load(_at(builder, a, r, NUMBER), align=4))
        for v in range(VECTORS):
            added.append(builder.fadd(sums[r * VECTORS + v], builder.fmul(factor, vectors[v])))
    return added


@intrinsic
def _sum_terms(typing, out, a, b, terms):
    """out (SUMS_OF, SUMS_WIDE) <- a^T b, for a (terms, SUMS_OF), b (terms, SUMS_WIDE): addresses."""

    def generate(context, builder, signature, values):
        out, a, b, terms = values
        before, loop, after = builder.block, *map(builder.append_basic_block, ("terms", "after"))
        builder.branch(loop)
        builder.position_at_end(loop)
        term = builder.phi(INTEGER)
        sums = [builder.phi(VECTOR) for _ in range(SUMS_OF * VECTORS)]
        places = [
            builder.add(start, builder.mul(term, ir.Constant(INTEGER, 4 * width)))
            for start, width in ((a, SUMS_OF), (b, SUMS_WIDE))
        ]
        added = _with_term(builder, sums, *places)
        following = builder.add(term, ir.Constant(INTEGER, 1))
        for value, start, next_one in zip(
            (term, *sums),
            (ir.Constant(INTEGER, 0), *[ir.Constant(VECTOR, [0.0] * LANES)] * len(sums)),
            (following, *added),
            strict=True,
        ):
            value.add_incoming(start, before)
            value.add_incoming(next_one, loop)
        builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
        builder.position_at_end(after)
        for i, value in enumerate(added):
            builder.store(value, _at(builder, out, i * LANES, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.intp), generate


def pack(factors: torch.Tensor, width: int) -> np.ndarray:
    """(groups, terms, width) of factors (terms, length): in groups of `width`, the last with zeros."""
    terms, length = factors.shape
    groups = -(-length // width)
    whole = functional.pad(factors, (0, groups * width - length))
    return whole.view(terms, groups, width).transpose(0, 1).contiguous().numpy()


@njit(nogil=True, cache=True)
def update(base, row, column, rows, columns, first, last, a, b):
    """A tile of base <- tile + a^T b, for groups [first, last) of its rows.

    The tile (rows, columns) begins at (row, column); a and b are packed, in groups of SUMS_OF and SUMS_WIDE.
    """
    sums = np.zeros((SUMS_OF, SUMS_WIDE), np.float32)
    for above in range(first, last):
        height = min(SUMS_OF, rows - above * SUMS_OF)
        for beside in range(b.shape[0]):
            left = beside * SUMS_WIDE
            width = min(SUMS_WIDE, columns - left)
            if b.shape[1]:
                _sum_terms(  # type: ignore[call-arg]  # the first is numba's
                    sums.ctypes.data, a[above].ctypes.data, b[beside].ctypes.data, b.shape[1]
                )
            for r in range(height):
                target = base[row + above * SUMS_OF + r, column + left : column + left + width]
                own = sums[r, :width]
                for c in range(width):
                    target[c] += own[c]
