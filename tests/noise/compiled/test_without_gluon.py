"""The two updates where Triton has no Gluon that is known: its own kernels have the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import driver

from mpies.noise import definition, gpu, gpu_update

SEEDS = np.array([3, 2**64 - 5, 0, 2**63], np.uint64)
# Of sizes that show the order of a sum; subnormal, which show how it begins; too large.
FACTORS = np.array(
    [[0.1, -1 / 3, 7, -1e-3], [1e-42, -3e-41, 1e-44, 1e-42], [3e38, 0.1, -2e38, 1]], np.float32
)


@pytest.fixture(autouse=True, params=[True, False], ids=["Gluon", "no Gluon"])
def gluon(request, monkeypatch):
    driver.active.launches.clear()
    if not request.param:
        monkeypatch.setattr(gpu, "_has_gluon", lambda: False)
    yield
    (used,) = {launch.in_gluon for launch in driver.active.launches if "update" in launch.kernel}
    assert used == request.param


def values(size: int) -> np.ndarray:
    """Subnormals, infinities, zeros of both signs among them."""
    made = np.random.default_rng(size).normal(0, 0.05, size).astype(np.float32)
    made[::7], made[1::7], made[2::77], made[3::7] = -0.0, 1e-42, np.inf, 0.0
    return made


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    """Any NaN is as good as another."""
    assert np.array_equal(found.isnan().numpy(), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.numpy()[numbers].view(np.int32), expected[numbers].view(np.int32))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("size, start", [(1, 77), (513, 0), (16_385, 5), (20_000, 2**40 + 5)])
@pytest.mark.parametrize("busy, factors", [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_update(monkeypatch, size, start, busy, factors):
    """A program works on one group of chunks, or on several: where few programs keep a GPU busy."""
    monkeypatch.setattr(gpu_update, "BUSY", busy)
    base = torch.from_numpy(values(size))
    expected = definition.updated(values(size), SEEDS, FACTORS[factors], 2**32 - 7, start)
    gpu.GpuKernels().update(base, SEEDS, FACTORS[factors], 2**32 - 7, start)
    assert_same_bits(base, expected)


@pytest.mark.parametrize("shape", [(1, 1), (65, 130)])
def test_lowrank_update(shape):
    matrix = values(shape[0] * shape[1]).reshape(shape)
    found = torch.from_numpy(matrix.copy())
    gpu.GpuKernels().lowrank_update(found, SEEDS, FACTORS[0], 7, 2)
    expected = definition.lowrank_updated(matrix, SEEDS, FACTORS[0], 7, 2)
    assert_same_bits(found, expected)
