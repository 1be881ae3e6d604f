"""Fused norms: those of torch's operations, with each row's own member's vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpies.model.norm_cpu import rms_norm

EPSILON = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(), (3,)], ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_rms_norm(dtype, heads, plus_one, summed):
    torch.manual_seed(0)
    members = np.array([1, 0, 0, 2, 1])
    x = torch.randn(5, *heads, 33).to(dtype)
    weights = torch.randn(3, 33).to(dtype)
    residual = torch.randn(5, *heads, 33).to(dtype) if summed else None
    total = x.double() + (residual.double() if summed else 0)
    own = weights[torch.from_numpy(members)].double().view(5, *[1] * len(heads), 33)
    normed = total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    expected = normed * (own + 1) if plus_one else normed.to(dtype).double() * own
    found, sums = rms_norm(x, residual, weights, members, EPSILON, plus_one)
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=tolerance / 4, rtol=tolerance)
    assert found.dtype == dtype and found.shape == x.shape
    if summed:
        assert torch.equal(sums, total.float().to(dtype))
    else:
        assert sums is None


def test_no_rows():
    found, _ = rms_norm(torch.zeros(0, 8), None, torch.ones(2, 8), np.zeros(0, np.int64), EPSILON, False)
    assert found.shape == (0, 8)
