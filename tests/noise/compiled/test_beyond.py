"""Kernels where places in a tensor need more than 31 bits: the last programs of grids too long to run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_in_gpu import room
from triton.runtime import driver

from mpies.noise import definition
from mpies.noise.definition import STREAM_A
from mpies.noise.gpu import GpuKernels

KERNELS = GpuKernels()
CPU = torch.device("cpu")
SEED, PARAMETER = 0xF123456789ABCDEF, 0xFFFFFFF9
SIZE = 3_000_000_001
SEEDS = np.array([3, SEED], np.uint64)
FACTORS = np.array([0.1, -0.3], np.float32)


def values(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, count).astype(np.float32))


@pytest.fixture(autouse=True)
def last_programs():
    """Only the last two programs of a grid are run."""
    kernels = "_perturb", "_update", "_round", "_digest", "_normal", "_lowrank_update"
    driver.active.only = dict.fromkeys(kernels, slice(-2, None))
    yield
    driver.active.only = {}


# What the last two programs work on, of a tensor of SIZE elements: 1024 elements each.
FIRST = (SIZE // 1024 - 1) * 1024


@pytest.fixture
def base():
    tensor = room(SIZE, torch.float32)
    tensor[FIRST:] = values(SIZE - FIRST)
    return tensor


def test_perturb(base):
    live = room(SIZE, torch.bfloat16)
    KERNELS.perturb(base, live, SEED, PARAMETER, 0.0123)
    expected = definition.perturbed(base[FIRST:].numpy(), SEED, PARAMETER, 0.0123, FIRST)
    assert torch.equal(live[FIRST:], torch.from_numpy(expected).bfloat16())
    assert not live[FIRST - 3000 : FIRST].any()


def test_update(base):
    expected = definition.updated(base[FIRST:].numpy(), SEEDS, FACTORS, PARAMETER, FIRST)
    KERNELS.update(base, SEEDS, FACTORS, PARAMETER)
    assert np.array_equal(base[FIRST:].numpy(), expected)


def test_round(base):
    rounded = room(SIZE, torch.bfloat16)
    KERNELS.round(base, rounded, SEED, PARAMETER)
    expected = definition.rounded(base[FIRST:].numpy(), SEED, PARAMETER, FIRST)
    assert np.array_equal(rounded[FIRST:].view(torch.int16).numpy().view(np.uint16), expected)


def test_digest(base):
    first = (SIZE // 4096 - 1) * 4096
    expected = definition.digest(base[first:].numpy(), PARAMETER, first)
    assert int(KERNELS.digest(base, PARAMETER)) % 2**64 == expected


def test_normal(monkeypatch):
    """More seeds than a grid has rows; of the last one, the last two programs."""
    seeds, count = np.arange(70_000, dtype=np.uint64) + SEED, 40_000
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: room(2_800_000_000, dtype).view(shape))
    made = KERNELS.normal(count, seeds, PARAMETER, STREAM_A, CPU)
    expected = definition.normal(int(seeds[-1]), PARAMETER, 38 * 1024, count - 38 * 1024, STREAM_A)
    assert np.array_equal(made[-1, 38 * 1024 :].numpy(), expected) and not made[0].any()


def test_lowrank_update():
    """The last two tiles of 128 x 64, one above the other."""
    del driver.active.only["_normal"]
    rows, columns = 60_010, 40_010
    base = room(rows * columns, torch.float32).view(rows, columns)
    top, left = rows // 128 * 128 - 128, columns // 64 * 64
    base[top:, left:] = values((rows - top) * (columns - left)).view(rows - top, -1)
    before = base[top:, left:].clone().numpy()
    KERNELS.lowrank_update(base, SEEDS, FACTORS, PARAMETER, 1)
    total = np.zeros_like(before)
    for seed, factor in zip(SEEDS, FACTORS, strict=True):
        a, b = definition.factors(int(seed), PARAMETER, (rows, columns), 1)
        total += (factor * a[0, top:])[:, None] * b[0, left:]
    assert np.array_equal(base[top:, left:].numpy(), before + total)
