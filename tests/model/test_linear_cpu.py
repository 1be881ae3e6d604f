"""Linear layers for few tokens: the products of torch's, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpies.model import linear_cpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (3, 5), (linear_cpu.FEW, 1), (linear_cpu.FEW + 1, 1), (0, 4), (7,), ()], ids=str
)
def test_linear_is_torchs_linear(dtype, bias, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 24).to(dtype), torch.randn(40, 24).to(dtype)
    offset = torch.randn(40).to(dtype) if bias else None
    y = linear_cpu.linear(x, weight, offset)
    expected = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert y.shape == (*shape, 40) and y.dtype == dtype and y.is_contiguous()
    # Products are rounded once, and once more where a bias is added.
    torch.testing.assert_close(
        y.double(), expected, atol=1e-1 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2
    )


def test_installed_in_plain_linear_layers_only():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 6), Scaled(6, 3, bias=False)).to(torch.bfloat16)
    x = torch.randn(2, 4).bfloat16()
    before = model(x)
    linear_cpu.install(model)
    torch.testing.assert_close(model(x), before, atol=1e-1, rtol=2e-2)
    model[0].weight.data.zero_()
    model[0].bias.data.zero_()
    assert not model(x).any(), "the layer's present weights are used"


@pytest.mark.parametrize("rows", [2, linear_cpu.FEW + 1])
def test_the_last_tokens_of_many_rows_are_one_product(rows):
    """Of an x with gaps, torch makes a batch of products, and so a copy of the weight for each row."""
    x, weight = torch.randn(rows, 3, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    with torch.inference_mode(), torch.profiler.profile() as seen:
        y = linear_cpu.linear(x[:, -1:], weight)
    assert "aten::bmm" not in {event.key for event in seen.key_averages()}
    assert y.equal(linear_cpu.linear(x[:, -1:].contiguous(), weight))
