"""RMS norms on a CPU, fused, with a vector of its own for each row's member.

As torch's operations one after another they take six times as long, and there are two in every layer.
"""

from __future__ import annotations

import numpy as np
import torch

from mpies.model.lowrank_cpu import LOOSE, at, narrow, place, raw, wide
from mpies.noise.compiling import njit


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _rms_norm(x_place, residual_place, out_place, rows, weights, members, each, epsilon, plus_one):
    """Of (rows, size) at those places, 0: no residual, and raw weights (M, size); see `rms_norm`."""
    shape = (rows, weights.shape[1])
    x, summed, out = (
        at(x_place, shape, weights),
        at(residual_place, shape, weights),
        at(out_place, shape, weights),
    )
    values = np.empty(x.shape[1], np.float32)
    for i in range(x.shape[0]):
        given, weight, made = x[i], weights[members[i // each]], out[i]
        squares = np.float32(0)
        if residual_place:
            residual = summed[i]
            for c in range(values.size):
                value = wide(given[c]) + wide(residual[c])
                residual[c] = narrow(value, residual[c])
                values[c] = value
                squares += value * value
        else:
            for c in range(values.size):
                value = wide(given[c])
                values[c] = value
                squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(values.size) + epsilon)
        if plus_one:
            for c in range(values.size):
                made[c] = narrow(values[c] * scale * (wide(weight[c]) + np.float32(1)), made[c])
        else:  # as models round that are known for it
            for c in range(values.size):
                normed = wide(narrow(values[c] * scale, made[c]))
                made[c] = narrow(normed * wide(weight[c]), made[c])


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: torch.Tensor,
    members: np.ndarray,
    epsilon: float,
    plus_one: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x + residual, normed and multiplied by each member's weights; and that sum.

    x (T, ..., size) and weights (M, size) are of a dtype that `lowrank_cpu.knows`; members int64 (T,).
    y = v / sqrt(mean(v^2) + epsilon) * w, in float32: v / sqrt is rounded before it is multiplied, or, with
    `plus_one`, not rounded, and multiplied by w + 1. The residual's memory is overwritten with the sum.
    """
    size = x.shape[-1]
    rows = x.numel() // size
    if size != weights.shape[1] or (residual is not None and residual.numel() != x.numel()):
        raise TypeError(f"x {tuple(x.shape)} with weights of {weights.shape[1]}, or another residual")
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    residual = None if residual is None else residual.contiguous()
    _rms_norm(
        place(x, weights.dtype), 0 if residual is None else place(residual, weights.dtype), out.data_ptr(),
        rows, raw(weights), members, rows // max(1, members.size), np.float32(epsilon), plus_one,
    )  # fmt: skip
    return out, residual
