"""Kernels on a tensor whose last places need more than 31 bits: its end and digest are the definition's."""

from __future__ import annotations

import numpy as np
import torch
from steps import Figure

from mpies.noise import definition, kernels_for
from mpies.ranks import gpu
from probes import parser, verdict, write

SIZE, END = 2**31 + 77_777, 5_000
SEED, PARAMETER = 2**64 - 5, 2**32 - 7
MANY = 70_000  # seeds
SEEDS, FACTORS = np.array([3, SEED], np.uint64), np.array([0.1, -1 / 3], np.float32)


def main() -> None:
    given = parser("beyond").parse_args()
    device = torch.device(gpu.KIND, 0)
    gpu.make_ready(device)
    kernels, figures = kernels_for(device, 1), []

    def compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        right = verdict(torch.equal(found.cpu(), expected))
        figures.append(Figure(name, expected.numel(), "elements", right))

    base = torch.zeros(SIZE, device=device)
    live = torch.zeros(SIZE, dtype=torch.bfloat16, device=device)
    first, zeros = SIZE - END, np.zeros(END, np.float32)
    kernels.perturb(base, live, SEED, PARAMETER, 0.01)
    expected = torch.from_numpy(definition.perturbed(zeros, SEED, PARAMETER, 0.01, first))
    compare("perturb", live[first:], expected.bfloat16())
    kernels.update(base, SEEDS, FACTORS, PARAMETER)
    updated = definition.updated(zeros, SEEDS, FACTORS, PARAMETER, first)
    compare("update", base[first:], torch.from_numpy(updated))
    kernels.round(base, live, SEED, PARAMETER)
    bits = definition.rounded(updated, SEED, PARAMETER, first).view(np.int16)
    compare("round", live[first:].view(torch.int16), torch.from_numpy(bits))
    whole = int(kernels.digest(base, PARAMETER))
    parts = int(kernels.digest(base[:first], PARAMETER)) + definition.digest(updated, PARAMETER, first)
    figures.append(Figure("digest", SIZE, "elements", verdict((whole - parts) % 2**64 == 0)))
    rows, columns, top, left = 46_410, 46_401, 46_300, 46_350
    matrix = base.zero_()[: rows * columns].view(rows, columns)
    kernels.lowrank_update(matrix, SEEDS, FACTORS, PARAMETER, 1)
    total = np.zeros((rows - top, columns - left), np.float32)
    for seed, factor in zip(SEEDS, FACTORS, strict=True):
        a, b = definition.factors(int(seed), PARAMETER, (rows, columns), 1)
        total += (factor * a[0, top:])[:, None] * b[0, left:]
    compare("low-rank update", matrix[top:, left:], torch.from_numpy(total))
    del base, live, matrix
    seeds = np.arange(MANY, dtype=np.uint64) + np.uint64(SEED - MANY)
    made = kernels.normal(SIZE // MANY + 1, seeds, PARAMETER, definition.STREAM_A, device)
    first = made.shape[1] - END
    normal = definition.normal(int(seeds[-1]), PARAMETER, first, END, definition.STREAM_A)
    compare("numbers of more seeds than a grid has rows", made[-1, first:], torch.from_numpy(normal))
    write(given.json, figures)


if __name__ == "__main__":
    main()
