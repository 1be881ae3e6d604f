"""Low-rank products on GPUs: what the kernels compute, there, or in Triton's interpreter, or emulated."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from mpies.model import lowrank_gpu
from mpies.ranks import gpu

pytestmark = pytest.mark.lengthy

# The result's last place: it may be rounded twice, and Triton's interpreter cuts off what GPUs round.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Where a GPU is, there is no interpreter, and kernels take no other memory than its own.
DEVICE = torch.device(gpu.KIND if torch.cuda.is_available() else "cpu")
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(DEVICE, dtype)


def integers(values: list) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As close as its dtype allows, the exact result being of the size of 1."""
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= CLOSE[found.dtype] * (2 if "TRITON_INTERPRET" in os.environ else 1)


@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "rows, tokens, inputs, outputs, rank",
    [
        (1, 1, 1, 1, 1),
        (5, 1, 33, 70, 1),
        (3, 4, 1500, 48, 2),  # several tiles of inputs
        (2, 1, 16, 4200, 3),  # several programs a row; a term that is nobody's
    ],
)
def test_products(rows, tokens, inputs, outputs, rank, biased, dtype):
    members = integers([(7 * row + 2) % 3 for row in range(rows)])
    shape = (rows, tokens) if tokens > 1 else (rows,)
    y, x = numbers(*shape, outputs, dtype=dtype), numbers(*shape, inputs, dtype=dtype)
    a, b = numbers(3 * rank, outputs, dtype=dtype), numbers(3 * rank, inputs, dtype=dtype)
    bias = numbers(3, outputs, dtype=dtype)
    mine = [t.double().view(3, rank, -1)[members] for t in (a, b)]
    dots = torch.einsum("rtk,rjk->rtj", x.double().view(rows, tokens, -1), mine[1])
    expected = y.double() + torch.einsum("rtj,rjn->rtn", dots, mine[0]).view(y.shape)
    if biased:
        expected += bias.double()[members].view(rows, *[1] * (y.dim() - 2), outputs)
    lowrank_gpu.add(y, x, members, a, b, rank, bias if biased else None)
    assert_close(y, expected)


@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "bounds, inputs, rank", [([0, 6, 9, 17], 8, 1), ([0, 40, 4200], 33, 3), ([0, 5], 1500, 2)]
)
def test_products_of_several_parts(bounds, inputs, rank, biased, dtype):
    """As vLLM has queries, keys and values below one another: each part has a b of its own."""
    members, outputs = integers([1, 0, 0, 2]), bounds[-1]
    y, x = numbers(4, outputs, dtype=dtype), numbers(4, inputs, dtype=dtype)
    a = numbers(3, rank, outputs, dtype=dtype)
    b = numbers(3, len(bounds) - 1, rank, inputs, dtype=dtype)
    bias = numbers(3, outputs, dtype=dtype)
    expected = y.double() + (bias.double()[members] if biased else 0)
    for part, (first, last) in enumerate(itertools.pairwise(bounds)):
        dots = torch.einsum("tk,trk->tr", x.double(), b.double()[members, part])
        expected[:, first:last] += torch.einsum("tr,trn->tn", dots, a.double()[members][..., first:last])
    spans = integers(lowrank_gpu.spans_of(bounds))
    lowrank_gpu.add_parts(y, x, members, a, b, spans, bias if biased else None)
    assert_close(y, expected)


@DTYPES
@pytest.mark.parametrize("columns, rank", [(33, 1), (1500, 3)])
def test_looked_up(columns, rank, dtype):
    members, ids = integers([2, 0, 1, 2]), integers([6, 0, 3, 3])
    y, a, b = (numbers(*shape, dtype=dtype) for shape in ((4, columns), (3, rank, 7), (3, 2, rank, columns)))
    mine = a.double()[members, :, ids]
    expected = y.double() + torch.einsum("tr,trk->tk", mine, b.double()[members, 0])
    lowrank_gpu.add_looked_up(y, ids, members, a, b)
    assert_close(y, expected)


@DTYPES
@pytest.mark.parametrize("plus_one", [True, False])
def test_norms_of_sums(dtype, plus_one):
    """As vLLM's layers have them: the sum is kept."""
    x, residual, vectors = (
        numbers(5, 33, dtype=dtype),
        numbers(5, 34, dtype=dtype)[:, 1:],
        numbers(3, 33, dtype=dtype),
    )
    residual, members = residual.contiguous(), integers([1, 0, 2, 2, 1])
    total = x.double() + residual.double()
    exact = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = exact * (vectors.double()[members] + (1 if plus_one else 0))
    found = lowrank_gpu.rms_norm(x, members, vectors, 1e-6, residual, plus_one)
    assert_close(found / 2, expected / 2)
    assert_close(residual, total)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 1, 33), (3, 2, 4, 64), (2, 1, 1500)])
def test_norms(shape, dtype):
    x, vectors = numbers(*shape, dtype=dtype), numbers(3, shape[-1], dtype=dtype)
    members = integers([(5 * row + 1) % 3 for row in range(shape[0])])
    mine = vectors.double()[members].view(-1, *[1] * (len(shape) - 2), shape[-1])
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close(lowrank_gpu.rms_norm(x, members, vectors, 1e-6) / 2, exact * mine / 2)


def test_nothing_is_nothing():
    nothing, members = torch.empty(0, 4, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    vectors = torch.empty(1, 4, device=DEVICE)
    lowrank_gpu.add(nothing, torch.empty(0, 3, device=DEVICE), members, vectors, vectors, 1, None)
    assert lowrank_gpu.rms_norm(nothing, members, vectors, 0).shape == (0, 4)
