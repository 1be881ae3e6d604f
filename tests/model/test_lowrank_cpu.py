"""The fused low-rank products: those of plain matrices, for any shapes, members, ranks and threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpies.model import lowrank_cpu
from mpies.model.lowrank_cpu import RawFactors
from mpies.noise.cpu import CpuKernels

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def assert_rounded_once(y: torch.Tensor, expected: torch.Tensor) -> None:
    """From sums in float32; `expected` is float64."""
    rounded = expected.to(y.dtype)
    torch.testing.assert_close(y, rounded, atol=1e-5, rtol=2**-7 if y.dtype == torch.bfloat16 else 1e-5)
    if y.dtype == torch.bfloat16:
        assert (y == rounded).double().mean() > 0.99


@DTYPES
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("tokens", [(), (1,), (5,)], ids=str)
@pytest.mark.parametrize("width", [1, 17, 600])
def test_add(monkeypatch, dtype, threads, rank, tokens, width):
    monkeypatch.setattr(lowrank_cpu, "WORTH_SHARING", 0)
    torch.manual_seed(0)
    members = np.array([1, 0, 0, 2, 1])
    x, y = torch.randn(5, *tokens, 40).to(dtype), torch.randn(5, *tokens, width).to(dtype)
    a, b = torch.randn(3, rank, width).to(dtype), torch.randn(3, rank, 40).to(dtype)
    expected = y.double()
    for row, member in enumerate(members):
        expected[row] += x[row].double() @ b[member].double().T @ a[member].double()
    lowrank_cpu.add(y, x, members, RawFactors.of(a, b.unsqueeze(1)), CpuKernels(threads).share)
    assert_rounded_once(y, expected)


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
def test_add_of_several_matrices_below_one_another(dtype, biased):
    """As vLLM has queries, keys and values: each part has a B of its own."""
    torch.manual_seed(0)
    members, bounds = np.array([1, 0, 0, 2]), [0, 6, 9, 17]
    x, y = torch.randn(4, 8).to(dtype), torch.randn(4, 17).to(dtype)
    a, b = torch.randn(3, 2, 17).to(dtype), torch.randn(3, 3, 2, 8).to(dtype)
    bias = torch.randn(3, 17).to(dtype) if biased else None
    expected = y.double()
    for row, member in enumerate(members):
        for part, (first, last) in enumerate(itertools.pairwise(bounds)):
            dots = b[member, part].double() @ x[row].double()
            expected[row, first:last] += dots @ a[member, :, first:last].double()
        if bias is not None:
            expected[row] += bias[member].double()
    lowrank_cpu.add(y, x, members, RawFactors.of(a, b, bounds, bias), CpuKernels(1).share)
    assert_rounded_once(y, expected)


@DTYPES
def test_not_a_number_stays_one(dtype):
    y, x = torch.randn(2, 8).to(dtype), torch.randn(2, 4).to(dtype)
    x[0, 1] = torch.nan
    before = y[1].clone()
    noise = RawFactors.of(torch.zeros(2, 1, 8).to(dtype), torch.randn(2, 1, 1, 4).to(dtype))
    lowrank_cpu.add(y, x, np.array([0, 1]), noise, CpuKernels(1).share)
    assert y[0].isnan().all() and torch.equal(y[1], before)


@pytest.mark.parametrize(
    "dtype, known", [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
def test_float16_is_left_to_matrix_products(dtype, known):
    assert lowrank_cpu.knows(torch.zeros(1, dtype=dtype)) is known
