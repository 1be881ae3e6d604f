"""Noise on the CPU: the kernel set, which spreads `cpu_kernels` over threads.

The work is cut into contiguous slices of whole chunks, one per thread; the kernels release the GIL.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mpies.noise import cpu_kernels, cpu_lowrank
from mpies.noise.cpu_kernels import BFLOAT16, FLOAT16, FLOAT32
from mpies.noise.definition import CHUNK, round_keys
from mpies.noise.factors import scaled_factors

LIVE_FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# A thread gets at least this many elements, so that small tensors are not cut up.
GRAIN = 128 * CHUNK


class CpuKernels:
    """The kernel set for CPU tensors, on `threads` threads. The number of threads changes no bit."""

    def __init__(self, threads: int = 1):
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def perturb(self, base, live, seed, parameter, scale, start=0):
        """live <- cast(base + scale * noise). Flat contiguous tensors; base float32, live any float."""
        source = base.numpy()
        target = _raw(live)
        keys = round_keys(seed)

        def work(a, b):
            cpu_kernels.perturb(
                source[a:b], target[a:b], LIVE_FORMATS[live.dtype], keys,
                np.uint64(parameter), np.float32(scale), start + a,
            )  # fmt: skip

        self._spread(base.numel(), work)

    def update(self, base, seeds, coefficients, parameter, start=0):
        """base += sum_i coefficients_i * noise(seeds_i), summed in float32 in the order given."""
        target = base.numpy()
        keys = _keys(seeds)
        numbers = np.asarray(coefficients, dtype=np.float32)

        def work(a, b):
            cpu_kernels.update(target[a:b], keys, numbers, np.uint64(parameter), start + a)

        self._spread(base.numel(), work)

    def normal(self, count, seeds, parameter, stream, device, start=0):
        """`count` numbers of a stream of each seed, from `start` on: float32 (M, count)."""
        out = np.empty((len(seeds), count), np.float32)
        keys = _keys(seeds)

        def work(a, b):
            cpu_kernels.normal(out[a:b], keys[a:b], np.uint64(parameter), np.uint64(stream), start)

        self.share(len(seeds), work)
        return torch.from_numpy(out)

    def lowrank_update(self, base, seeds, coefficients, parameter, rank, matrix=0):
        """base += sum_i coefficients_i * E(seeds_i) for a matrix; see `definition.lowrank_updated`."""
        target = base.numpy()
        for tile in scaled_factors(self, base, seeds, coefficients, parameter, rank, matrix):
            self._update_tile(target, tile)

    def _update_tile(self, target, tile):
        rows, columns = tile.a.shape[1], tile.b.shape[1]
        a = cpu_lowrank.pack(tile.a, cpu_lowrank.SUMS_OF)
        b = cpu_lowrank.pack(tile.b, cpu_lowrank.SUMS_WIDE)

        def work(first, last):
            cpu_lowrank.update(target, tile.row, tile.column, rows, columns, first, last, a, b)

        self.share(len(a), work)

    def digest(self, base, parameter, start=0):
        """The base's digest: int64 (); add over slices and parameters modulo 2^64."""
        patterns = base.numpy().view(np.uint32)

        def work(a, b):
            return int(cpu_kernels.digest(patterns[a:b], np.uint32(parameter), start + a))

        total = sum(self._spread(base.numel(), work)) % 2**64
        return torch.from_numpy(np.array(total, np.uint64).view(np.int64))

    def round(self, value, base, seed, parameter, start=0):
        """base <- value, rounded at random; see `definition.rounded`. Flat; float32 to bfloat16."""
        source, target = value.numpy().view(np.uint32), _raw(base)
        keys = round_keys(seed)

        def work(a, b):
            cpu_kernels.round_at_random(source[a:b], target[a:b], keys, np.uint64(parameter), start + a)

        self._spread(value.numel(), work)

    def _spread(self, size, work):
        """Call work(a, b) on slices of whole chunks, one per thread."""
        parts = max(1, min(self.threads, size // GRAIN))
        step = -(-size // (parts * CHUNK)) * CHUNK or 1
        return self._each([(a, min(a + step, size)) for a in range(0, size, step)], work)

    def share(self, count, work):
        """Call work(a, b) on equal parts of a count, one per thread."""
        parts = max(1, min(self.threads, count))
        bounds = [count * part // parts for part in range(parts + 1)]
        return self._each(list(itertools.pairwise(bounds)), work)

    def _each(self, spans, work):
        if self._pool is None or len(spans) < 2:
            return [work(a, b) for a, b in spans]
        return list(self._pool.map(lambda span: work(*span), spans))


def _keys(seeds) -> np.ndarray:
    """Philox's key schedules: uint64 (M, 10, 2)."""
    return _key_schedules(np.asarray(seeds, np.uint64).tobytes())


@functools.lru_cache(maxsize=4)
def _key_schedules(seeds: bytes) -> np.ndarray:
    """Of raw uint64 seeds. A generation asks for the same ones for every tensor."""
    return np.stack([round_keys(int(seed)) for seed in np.frombuffer(seeds, np.uint64)])


def _raw(live: torch.Tensor) -> np.ndarray:
    """A live tensor's memory as unsigned integers of its element size (NumPy has no bfloat16)."""
    if live.dtype == torch.float32:
        return live.numpy().view(np.uint32)
    return live.view(torch.int16).numpy().view(np.uint16)
