"""Low-rank products of more rows than CUDA lets a grid's second axis have, and of places beyond 31 bits.

The last programs of a launch are run; the stand-in refuses grids that a GPU would.
"""

from __future__ import annotations

import pytest
import torch
from stand_in_gpu import room
from triton.runtime import driver

from mpies.model import lowrank_gpu

ROWS = 70_000  # 8192 tokens of a prompt, each to 8 experts and more
KERNELS = "_add", "_add_parts", "_add_looked_up", "_rms_norm"


@pytest.fixture(autouse=True)
def last_program():
    driver.active.only = dict.fromkeys(KERNELS, slice(-1, None))
    yield
    driver.active.only = {}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def last_member(rows: int, member: int) -> torch.Tensor:
    members = torch.zeros(rows, dtype=torch.int64)
    members[-1] = member
    return members


# As a mixture of experts has them, and as a norm of many heads has them.
@pytest.mark.parametrize("rows, tokens", [(ROWS, 1), (2, ROWS)])
def test_rows(rows, tokens):
    y, x = numbers(rows, tokens, 5), numbers(rows, tokens, 3)
    a, b, vectors = numbers(3, 5), numbers(3, 3), numbers(3, 5)
    members = last_member(rows, 2)
    total = y[-1, -1] + (x[-1, -1] @ b[2]) * a[2]
    lowrank_gpu.add(y, x, members, a, b, 1, None)
    assert torch.allclose(y[-1, -1], total)
    normal = lowrank_gpu.rms_norm(y, members, vectors, 1e-6)
    assert torch.allclose(normal[-1, -1], vectors[2] * total * total.square().mean().rsqrt(), atol=1e-4)


def test_rows_of_several_parts():
    y, x, a, b = numbers(ROWS, 7), numbers(ROWS, 3), numbers(3, 1, 7), numbers(3, 2, 1, 3)
    spans = torch.tensor(lowrank_gpu.spans_of([0, 4, 7]))
    expected = y[-1, 4:] + (x[-1] @ b[2, 1, 0]) * a[2, 0, 4:]
    lowrank_gpu.add_parts(y, x, last_member(ROWS, 2), a, b, spans, None)
    assert torch.allclose(y[-1, 4:], expected)


# Beyond 2^31 elements: each in tensors of which only what is touched takes memory.


def test_a_far_row():
    """Of y and x, 70,000 rows of 40,000 are 2.8e9 elements."""
    y, x = (room(ROWS * 40_000, torch.bfloat16).view(ROWS, -1) for _ in range(2))
    x[-1, -1], members = 2.0, last_member(ROWS, 1)
    a, b = (torch.zeros(2, 40_000, dtype=torch.bfloat16) for _ in range(2))
    a[1, -1], b[1, -1] = 3.0, 5.0
    lowrank_gpu.add(y, x, members, a, b, 1, None)
    assert y[-1, -1] == 30 and not y[-1, :-1].any()
    y[-1, -1] = 0
    spans = torch.tensor(lowrank_gpu.spans_of([0, 40_000]))
    lowrank_gpu.add_parts(y, x, members, a.view(2, 1, -1), b.view(2, 1, 1, -1), spans, None)
    assert y[-1, -1] == 30


def test_a_far_norm(monkeypatch):
    rows, size = ROWS * 10, 4096
    x, residual = (room(rows * size, torch.bfloat16).view(rows, -1) for _ in range(2))
    monkeypatch.setattr(torch, "empty_like", lambda like: room(like.numel(), like.dtype).view(like.shape))
    residual[-1], vectors = 3.0, torch.ones(2, size, dtype=torch.bfloat16)
    vectors[1] = 2.0
    y = lowrank_gpu.rms_norm(x, last_member(rows, 1), vectors, 0.0, residual)
    assert (y[-1] == 2).all() and not y[-2].any() and (residual[-1] == 3).all()


def test_a_far_member():
    """Its factors, its bias and its vector: of 70,000 members, who are more than a block ever has."""
    size, rank = 35_000, 1
    a, bias = (room(ROWS * size, torch.bfloat16).view(ROWS, -1) for _ in range(2))
    b, vectors = (room(ROWS * 32_768, torch.bfloat16).view(ROWS, -1) for _ in range(2))
    a[-1, -1], b[-1, -1], bias[-1, -1], vectors[-1] = 3.0, 5.0, 1.0, 2.0
    y, x = torch.zeros(1, size, dtype=torch.bfloat16), torch.ones(1, 32_768, dtype=torch.bfloat16)
    members = torch.tensor([ROWS - 1])
    lowrank_gpu.add(y, x, members, a, b, rank, bias)
    assert y[0, -1] == 16
    y.zero_()
    spans = torch.tensor(lowrank_gpu.spans_of([0, size]))
    lowrank_gpu.add_parts(y, x, members, a.view(ROWS, 1, -1), b.view(ROWS, 1, 1, -1), spans, bias)
    assert y[0, -1] == 16
    assert (lowrank_gpu.rms_norm(x, members, vectors, 0.0) == 2).all()


def test_a_far_token_and_member_looked_up():
    """Of an embedding's noise: y, the last entry of the last member's a, and its b."""
    columns, entries = 33_000, 70_000
    y = room(ROWS * columns, torch.bfloat16).view(ROWS, -1)
    a = room(ROWS * entries, torch.bfloat16).view(ROWS, 1, -1)
    b = room(ROWS * columns, torch.bfloat16).view(ROWS, 1, 1, -1)
    a[-1, 0, -1], b[-1, 0, 0, -1] = 3.0, 5.0
    ids = torch.full((ROWS,), entries - 1)
    lowrank_gpu.add_looked_up(y, ids, last_member(ROWS, ROWS - 1), a, b)
    assert y[-1, -1] == 15 and not y[-1, :-1].any() and not y[-2].any()
